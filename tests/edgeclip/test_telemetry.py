"""ONNX Runtime's telemetry is off: no file at home, no look-up, and a forked child ends."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES, ROOT

BAG = str(EXAMPLES / "bag.png")

CLASSIFY = """
import sys
import edgeclip
print(edgeclip.Runtime("garments", labels=["bag", "boot"]).classify(sys.argv[1])[0].label)
"""
FORK = """
import os, sys
import edgeclip
rt = edgeclip.Runtime("garments", labels=["bag", "boot"])
for _ in range(30):  # a child that destroys the parent's session hangs about once in 30
    rt.classify(sys.argv[1])
    child = os.fork()
    if child == 0:
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end="")
"""
# Counts what would go to the network: look-ups of names, and connections but to local sockets.
SHIM = r"""
#define _GNU_SOURCE
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
static void note(const char* what) {
  FILE* file = fopen(getenv("SHIM_LOG"), "a");
  if (file) { fprintf(file, "%s\n", what); fclose(file); }
}
int getaddrinfo(const char* node, const char* service, const struct addrinfo* hints,
                struct addrinfo** result) {
  note(node ? node : "getaddrinfo");
  return EAI_FAIL;
}
struct hostent* gethostbyname(const char* name) { note(name); return 0; }
int connect(int fd, const struct sockaddr* address, socklen_t length) {
  if (address->sa_family != AF_UNIX) note("connect");
  return -1;
}
"""


def run(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    inherited |= {"HOME": str(home), "EDGECLIP_CACHE": str(home / "edgeclip")} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, BAG],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=inherited,
        cwd=ROOT,
    )


def test_nothing_is_left_at_home(tmp_path: Path) -> None:
    done = run(CLASSIFY, tmp_path)
    assert (done.stdout, done.stderr) == ("bag\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["edgeclip"]


def test_a_home_that_cannot_be_written_is_no_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    home = tmp_path / "file"  # no folder can be made below it, not even by root
    done = run(CLASSIFY, home, EDGECLIP_CACHE=str(tmp_path / "cache"))
    assert (done.stdout, done.stderr) == ("bag\n", "")


def test_a_forked_child_ends(tmp_path: Path) -> None:
    done = run(FORK, tmp_path)
    assert (done.stdout, done.stderr) == ("7" * 30, "")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_nothing_is_looked_up(tmp_path: Path) -> None:
    source, shim, log = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "log"
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source], check=True)
    seen = "import socket\ntry: socket.getaddrinfo('seen.invalid', 80)\nexcept OSError: pass\n"
    environment = {"LD_PRELOAD": str(shim), "SHIM_LOG": str(log)}
    run(seen, tmp_path, **environment)
    assert log.read_text() == "seen.invalid\n"  # the shim works
    log.unlink()
    # Some seconds for what a thread might send later.
    done = run(CLASSIFY + "import time; time.sleep(3)\n", tmp_path / "home", **environment)
    assert done.stdout == "bag\n", done.stderr
    assert not log.exists(), log.read_text()


def test_the_users_own_choice_stays(tmp_path: Path) -> None:
    code = "import os, edgeclip; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(code, tmp_path).stdout == "1\n"
    assert run(code, tmp_path, ORT_DISABLE_TELEMETRY="0").stdout == "0\n"


@pytest.mark.parametrize("package", ["edgeclip", "export", "train", "benchmarks"])
def test_onnx_runtime_is_imported_after_edgeclip(package: str) -> None:
    """Importing edgeclip switches it off: no module may import ONNX Runtime as it is loaded itself."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                assert not any(name.startswith("onnxruntime") for name in names), file
