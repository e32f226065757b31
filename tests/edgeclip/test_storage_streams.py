"""Writes into devices, pipes, sockets and other open descriptors."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edgeclip import EdgeclipError, storage
from tests.support.data.folders import names

NEW = b"new contents"


def test_devices_are_written_into(tmp_path: Path, devices: dict[str, Path]) -> None:
    null, full = devices["null"], devices["full"]
    (tmp_path / "null").symlink_to(null)
    for path in (null, tmp_path / "null"):
        storage.write(path, NEW)
        with storage.draft(path) as part:
            part.write_bytes(NEW)
        assert storage.is_stream(path)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert (tmp_path / "null").is_symlink()
    with pytest.raises(EdgeclipError, match="No space left"):
        storage.write(full, NEW)
    assert stat.S_ISCHR(full.stat().st_mode)


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    with storage.writing(path) as file:
        np.savez(file, embeddings=np.arange(6).reshape(2, 3))
    reader.join()
    with np.load(io.BytesIO(received[0])) as arrays:
        np.testing.assert_array_equal(arrays["embeddings"], [[0, 1, 2], [3, 4, 5]])
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == {"fifo"}


def test_a_socket_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(EdgeclipError, match="cannot write socket: No such device"):
            storage.write("socket", NEW)
    assert stat.S_ISSOCK(os.stat("socket").st_mode)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}", "link", "number"])
def test_a_descriptor_is_written_into(tmp_path: Path, kind: str, form: str) -> None:
    if kind == "pipe":
        reading, fd = os.pipe()
        read = open(reading, "rb")  # noqa: SIM115
    else:
        read_end, write_end = socket.socketpair()
        read, fd = read_end.makefile("rb"), write_end.detach()
        read_end.close()
    path: str | Path | int = {"number": fd, "link": tmp_path / "link"}.get(form, form.format(fd))
    (tmp_path / "link").symlink_to(f"/dev/fd/{fd}")
    assert storage.is_stream(path)
    storage.write(path, b"one ") if not isinstance(path, int) else os.write(fd, b"one ")
    with storage.writing(path) as file:
        np.savez(file, a=np.arange(3))
    os.close(fd)
    with read:
        assert read.read(4) == b"one "
        with np.load(io.BytesIO(read.read())) as arrays:
            assert arrays["a"].tolist() == [0, 1, 2]
    assert (tmp_path / "link").is_symlink()


def test_standard_output_that_is_a_file_is_not_truncated(tmp_path: Path) -> None:
    # { echo first; python; echo last; } > file
    code = (
        "from edgeclip import storage; print('printed'); storage.write('/dev/stdout', 'written ')"
    )
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(b"first ")
        file.flush()
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
        os.write(file.fileno(), b"last")
    assert path.read_bytes() == b"first printed\nwritten last"


def test_a_zip_file_appended_to_a_file_is_whole(tmp_path: Path, devices: dict[str, Path]) -> None:
    # >> file
    path = tmp_path / "file"
    path.write_bytes(b"first ")
    with open(path, "ab") as file, storage.writing(file.fileno()) as out:
        np.savez(out, a=np.arange(3))
    with np.load(io.BytesIO(path.read_bytes().removeprefix(b"first "))) as arrays:
        assert arrays["a"].tolist() == [0, 1, 2]
    with storage.writing(devices["null"]) as out:
        np.savez(out, a=np.arange(3))


def test_a_closed_reader_raises_broken_pipe() -> None:
    reading, fd = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), storage.writing(fd) as file:
        file.write(NEW)
    os.close(fd)
