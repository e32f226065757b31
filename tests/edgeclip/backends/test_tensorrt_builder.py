"""Engines, built by modules with the names of real TensorRTs: see tests/support/fake_tensorrt.py."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgeclip.backends import engine_cache, tensorrt_builder
from edgeclip.backends.tensorrt_builder import (
    BuildOptions,
    EngineCache,
    EngineKey,
    Gpu,
    build_engine,
    engine_key,
)
from edgeclip.bundle import EMBEDDED
from edgeclip.errors import DeviceError, EdgeclipError
from tests.support import fake_tensorrt
from tests.support.schema1 import schema1_bundle

IMAGE = EMBEDDED / "image_encoder.fp32.onnx"
ORIN = Gpu("Orin", (8, 7))
STANDARD = [name for name in fake_tensorrt.surfaces() if name.startswith("tensorrt-")]
RTX = [name for name in fake_tensorrt.surfaces() if name.startswith("tensorrt_rtx-")]

ONNX = Callable[..., Path]


@pytest.fixture(params=fake_tensorrt.surfaces())
def trt(request: pytest.FixtureRequest) -> ModuleType:
    """Each TensorRT whose names were recorded."""
    return fake_tensorrt.module(request.param)


@pytest.fixture
def jetpack() -> ModuleType:
    """TensorRT 10.3, of JetPack 6.1 and 6.2."""
    return fake_tensorrt.module("tensorrt-10.3.0")


@pytest.fixture
def graph_of(tmp_path: Path) -> ONNX:
    """An ONNX file with inputs of the shapes given, where a text is a symbolic size."""

    def make(
        operators: tuple[str, ...] = ("Identity",), /, **inputs: tuple[int | str, ...]
    ) -> Path:
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in inputs.items()
        ]
        nodes = [
            helper.make_node(operator, [values[0].name], [f"out{i}"])
            for i, operator in enumerate(operators)
        ]
        outputs = [helper.make_tensor_value_info("out0", TensorProto.FLOAT, ("batch", 5))]
        made = helper.make_model(helper.make_graph(nodes, "made", values, outputs))
        path = tmp_path / "made.onnx"
        onnx.save(made, path)
        return path

    return make


def built(trt: ModuleType, graph: Path, options: BuildOptions | None = None, **how: Any) -> Any:
    return json.loads(build_engine(graph, trt, options or BuildOptions(), **how))


def test_the_recorded_versions_are_those_of_jetpack_and_of_the_newest_tensorrt() -> None:
    versions = {name.rpartition("-")[0]: [] for name in fake_tensorrt.surfaces()}
    for name in fake_tensorrt.surfaces():
        versions[name.rpartition("-")[0]].append(name.rpartition("-")[2].rsplit(".", 2)[0])
    assert {"10.13", "10.16", "11.4"} < set(versions["tensorrt"])
    assert "tensorrt-10.3.0" in STANDARD
    old, new = (fake_tensorrt.module(f"tensorrt-{x}") for x in ("10.3.0", "11.4.0.106"))
    # What edgeclip has to be careful of.
    assert hasattr(old.BuilderFlag, "FP16")
    assert not hasattr(new.BuilderFlag, "FP16")
    assert old.NetworkDefinitionCreationFlag.STRONGLY_TYPED == 1
    assert new.NetworkDefinitionCreationFlag.STRONGLY_TYPED == 0


def test_a_fake_has_no_name_that_was_not_recorded(jetpack: ModuleType) -> None:
    with pytest.raises(AttributeError):
        _ = jetpack.IRuntimeConfig
    config = jetpack.IBuilderConfig()
    with pytest.raises(AttributeError):
        config.tiling_optimization_level = 1
    with pytest.raises(AttributeError):
        config.set_compute_capability(None, 0)


# So that an engine of TensorRT-RTX can be part of a CUDA graph.
ADDED = {"tensorrt": [], "tensorrt_rtx": ["REQUIRE_USER_ALLOCATION"]}


def test_engines_are_strongly_typed_without_any_flag_of_precision(trt: ModuleType) -> None:
    found = built(trt, IMAGE)
    assert found["network_flags"] == ["STRONGLY_TYPED"]
    assert found["builder_flags"] == ADDED[trt.__name__]  # and TF32, set at first, is cleared
    assert found["pools"] == {"WORKSPACE": 1 << 30}
    one, most = [1, 3, 28, 28], [8, 3, 28, 28]
    assert found["profiles"] == [{"pixels": [one, one, most]}]


def test_options_reach_the_builder(trt: ModuleType) -> None:
    options = BuildOptions(max_batch=32, opt_batch=4, workspace_bytes=1 << 28, optimization_level=5)
    found = built(trt, IMAGE, options)
    assert [shape[0] for shape in found["profiles"][0]["pixels"]] == [1, 4, 32]
    assert found["pools"] == {"WORKSPACE": 1 << 28}
    assert found["optimization_level"] == 5
    found = built(trt, IMAGE, BuildOptions(workspace_bytes=None))
    assert found["pools"] == {}
    assert found["optimization_level"] == 3


def test_only_the_outputs_that_are_asked_for_are_kept(trt: ModuleType) -> None:
    image = schema1_bundle().path / "image_encoder.fp32.onnx"
    assert built(trt, image)["outputs"] == ["embedding", "tokens"]
    assert built(trt, image, BuildOptions(outputs=("embedding",)))["outputs"] == ["embedding"]


def test_every_tensorrt_has_what_runs_an_engine(trt: ModuleType) -> None:
    for owner, names in {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            "num_io_tensors",
            "get_tensor_name",
            "get_tensor_shape",
            "get_tensor_profile_shape",
            "create_execution_context",
            "device_memory_size_v2",
        ],
        trt.IExecutionContext: [
            "set_optimization_profile_async",
            "set_input_shape",
            "set_tensor_address",
            "set_device_memory",
            "execute_async_v3",
        ],
    }.items():
        assert [name for name in names if not hasattr(owner, name)] == []
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"max_batch": 2, "opt_batch": 3}, "opt_batch 3 is above max_batch 2"),
        ({"workspace_bytes": -1}, "workspace_bytes must not be negative"),
        ({"optimization_level": 6}, "optimization_level must be 0 to 5, got 6"),
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildOptions(**wrong)


def test_profiles_of_every_kind_of_graph(jetpack: ModuleType, graph_of: ONNX) -> None:
    def profile(options: BuildOptions | None = None, **inputs: tuple[int | str, ...]) -> Any:
        return built(jetpack, graph_of(**inputs), options)["profiles"]

    batch = [[1, 32], [1, 32], [8, 32]]
    prior = {"z": ("batch", 32), "timestep": ("batch",), "noise": ("batch", 32)}
    assert profile(**prior) == [{"z": batch, "timestep": [[1], [1], [8]], "noise": batch}]
    assert profile(ids=("batch", "length")) == [{"ids": [[1, 1], [8, 16], [8, 77]]}]
    short = BuildOptions(context_length=12)
    assert profile(short, ids=("batch", "length")) == [{"ids": [[1, 1], [8, 12], [8, 12]]}]
    assert profile(ids=("batch", 64)) == [{"ids": [[1, 64], [8, 64], [8, 64]]}]
    fused = profile(pixels=("batch", 3, 8, 8), classes=("classes", 32), null_text=(32,))
    assert fused[0]["classes"] == [[5, 32], [100, 32], [32768, 32]]  # for the best 5
    assert "null_text" not in fused[0]  # its size is known
    assert profile(pixels=(1, 3, 8, 8)) == []
    with pytest.raises(DeviceError, match="a range for axis 2 of input 'pixels'"):
        profile(pixels=("batch", 3, "height", 8))


@pytest.mark.parametrize("name", RTX)
def test_tensorrt_rtx_builds_for_a_gpu_that_is_not_here(name: str) -> None:
    trt = fake_tensorrt.module(name)
    assert built(trt, IMAGE)["capabilities"] == []
    assert built(trt, IMAGE, capability=(8, 6))["capabilities"] == ["SM86"]
    with pytest.raises(DeviceError, match=r"builds for SM75, SM80, SM86, SM89, SM120.*, not SM87"):
        build_engine(IMAGE, trt, BuildOptions(), capability=(8, 7))


@pytest.mark.parametrize("name", STANDARD)
def test_tensorrt_builds_for_the_gpu_that_is_here(name: str) -> None:
    trt = fake_tensorrt.module(name)
    with pytest.raises(DeviceError, match=r"this machine only.*TensorRT-RTX: pip install") as err:
        build_engine(IMAGE, trt, BuildOptions(), capability=(8, 6))
    assert "\n" not in str(err.value)
    assert trt._fake.builds == []


@pytest.mark.parametrize("name", STANDARD)
def test_kernel_timings_are_kept(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "orin.timings"
    trt = fake_tensorrt.module(name)
    assert built(trt, IMAGE, timing_cache=path)["known_timings"] == ""
    text = EMBEDDED / "text_encoder.fp32.onnx"
    assert built(trt, text, timing_cache=path)["known_timings"] == f"{IMAGE.name}\n"
    after = built(trt, IMAGE, timing_cache=path)["known_timings"]
    assert after == f"{IMAGE.name}\n{text.name}\n"
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no draft is left
    assert built(trt, IMAGE)["known_timings"] is None


@pytest.mark.parametrize("name", RTX)
def test_tensorrt_rtx_keeps_no_timings(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rtx.timings"
    assert built(fake_tensorrt.module(name), IMAGE, timing_cache=path)["known_timings"] is None
    assert not path.exists()


@pytest.mark.parametrize("data", [b"garbage", b"timings 9.1 GPU\nold\n", b"timings 10.3.0 Other\n"])
def test_timings_that_are_damaged_or_foreign_are_replaced(
    data: bytes, jetpack: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "orin.timings"
    path.write_bytes(data)
    with caplog.at_level(logging.INFO):
        assert built(jetpack, IMAGE, timing_cache=path)["known_timings"] == ""
    assert f"{path} is of another TensorRT or GPU, or damaged" in caplog.text
    assert path.read_bytes() == f"timings 10.3.0 GPU\n{IMAGE.name}\n".encode()


def test_timings_that_cannot_be_written_cost_no_engine(
    jetpack: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert built(jetpack, IMAGE, timing_cache=tmp_path / "file" / "orin.timings")
    assert "cannot keep kernel timings" in caplog.text


def test_no_timings_are_kept_of_a_build_that_failed(jetpack: ModuleType, tmp_path: Path) -> None:
    jetpack._fake.refuses = "no kernel"
    with pytest.raises(DeviceError):
        build_engine(IMAGE, jetpack, BuildOptions(), timing_cache=tmp_path / "orin.timings")
    assert not list(tmp_path.iterdir())


def test_progress_names_phases_within_phases(trt: ModuleType) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engine(IMAGE, trt, BuildOptions(), progress=lambda *step: seen.append(step))
    inner = "Building engine > Timing graph nodes"
    assert list(dict.fromkeys(seen)) == [
        ("Building engine", 0, 1),
        *((inner, done, 3) for done in range(4)),
        ("Building engine", 1, 1),
    ]


def test_an_error_of_the_progress_callback_ends_the_build(trt: ModuleType) -> None:
    def progress(_: str, done: int, __: int) -> None:
        if done == 2:
            raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        build_engine(IMAGE, trt, BuildOptions(), progress=progress)
    assert trt._fake.cancelled


def test_ctrl_c_ends_the_build(trt: ModuleType) -> None:
    trt._fake.steps = 100_000
    steps: list[int] = []

    def progress(_: str, done: int, __: int) -> None:
        if done == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        steps.append(done)
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        build_engine(IMAGE, trt, BuildOptions(), progress=progress)
    assert trt._fake.cancelled
    assert max(steps) < trt._fake.steps
    trt._fake.steps = 3
    assert build_engine(IMAGE, trt, BuildOptions())  # nothing is left locked


def test_what_the_parser_does_not_support_is_said_in_a_line(
    trt: ModuleType, graph_of: ONNX
) -> None:
    path = graph_of(
        ("MatMulInteger", "DynamicQuantizeLinear", "MatMulInteger"), pixels=(1, 3, 8, 8)
    )
    with pytest.raises(DeviceError) as err:
        build_engine(path, trt, BuildOptions())
    assert str(err.value) == (
        f"{trt.__name__} {trt.__version__} cannot read {path}: "
        "MatMulInteger: checkMatMulInteger, UNSUPPORTED_NODE: false (2 times); "
        "DynamicQuantizeLinear: checkDynamicQuantizeLinear, UNSUPPORTED_NODE: false"
    )


def test_files_that_are_no_graph(jetpack: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"golden.npz: .*MODEL_DESERIALIZE_FAILED"):
        build_engine(EMBEDDED / "golden.npz", jetpack, BuildOptions())
    with pytest.raises(DeviceError, match=r"none.onnx does not exist"):
        build_engine(tmp_path / "none.onnx", jetpack, BuildOptions())


def test_weights_beside_the_graph_are_found_from_any_folder(
    jetpack: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "graph.onnx"
    model = onnx.load(IMAGE)
    onnx.save(model, path, save_as_external_data=True, location="graph.onnx.data")
    assert built(jetpack, path)["graph"] == str(path)
    (tmp_path / "graph.onnx.data").unlink()
    with pytest.raises(DeviceError, match=r"graph.onnx.data"):
        build_engine(path, jetpack, BuildOptions())


def test_the_last_error_is_the_reason(trt: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    trt._fake.refuses = "Error Code 10: Could not find any\n implementation for node x"
    with pytest.raises(DeviceError) as err:
        build_engine(IMAGE, trt, BuildOptions())
    assert str(err.value) == (
        f"{trt.__name__} {trt.__version__} built no engine of {IMAGE}: "
        "Error Code 10: Could not find any implementation for node x"
    )
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    trt._fake.refuses, trt._fake.warns = "", "Profile kMAX values are not self-consistent"
    caplog.clear()
    assert build_engine(IMAGE, trt, BuildOptions())
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "WARNING",
        "TensorRT: Profile kMAX values are not self-consistent",
    )
    assert tensorrt_builder.trt_logger(trt).last_error == ""


def test_without_a_driver(trt: ModuleType) -> None:
    trt._fake.driver = False
    with pytest.raises(DeviceError) as err:
        build_engine(IMAGE, trt, BuildOptions())
    assert str(err.value) == (
        f"{trt.__name__} {trt.__version__} does not work here: "
        "CUDA initialization failure with error: 35"
    )


def test_import(monkeypatch: pytest.MonkeyPatch, jetpack: ModuleType) -> None:
    rtx = fake_tensorrt.module(RTX[0])
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", jetpack)
    assert tensorrt_builder.import_tensorrt() is jetpack
    monkeypatch.setattr(jetpack, "__version__", "8.6.2")
    with pytest.raises(
        DeviceError, match=r"tensorrt 8.6.2 is too old, edgeclip needs 10.3 or later: pip"
    ):
        tensorrt_builder.import_tensorrt()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise ModuleNotFoundError(name='tensorrt')", "tensorrt is not installed: pip install"),
        ("import tensorrt_bindings_of_nobody", r"installed in part \(No module named"),
        (
            "raise ImportError('libnvinfer.so.10: cannot open\\nshared object file')",
            r"libraries do not load \(libnvinfer.so.10: cannot open shared object file\)",
        ),
        ("raise OSError('libcuda.so.1: no such file')", "libraries do not load"),
    ],
)
def test_a_module_that_does_not_import(
    module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(module)
    (tmp_path / "tensorrt_rtx.py").write_text("raise ModuleNotFoundError(name='tensorrt_rtx')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(DeviceError, match=message) as err:
        tensorrt_builder.import_tensorrt()
    assert "--system-site-packages" in str(err.value)
    assert "\n" not in str(err.value)


def key(**changed: Any) -> EngineKey:
    made = engine_key(
        ["11" * 32, "22" * 32], fake_tensorrt.module("tensorrt-10.3.0"), ORIN, BuildOptions()
    )
    return dataclasses.replace(made, **changed)


def test_the_key_says_how_the_engine_is_built(trt: ModuleType) -> None:
    found = engine_key(["11" * 32], trt, ORIN, BuildOptions(max_batch=4))
    assert found.fields() == {
        "graphs": ["11" * 32],
        "module": trt.__name__,
        "version": trt.__version__,
        "capability": [8, 7],
        "device": "Orin",
        "options": {
            "max_batch": 4,
            "opt_batch": 1,
            "context_length": 77,
            "outputs": [],
            "workspace_bytes": 1 << 30,
            "optimization_level": None,
        },
        "flags": ["STRONGLY_TYPED", *ADDED[trt.__name__], "not TF32"],
        "recipe": engine_cache.RECIPE,
    }


def test_whatever_makes_another_engine_makes_another_key() -> None:
    others = [
        key(graphs=("11" * 32,)),
        key(module="tensorrt_rtx"),
        key(version="10.3.1"),
        key(capability=(8, 6)),
        key(device="Thor"),
        key(flags=()),
        key(options=BuildOptions(max_batch=9)),
        key(options=BuildOptions(opt_batch=2)),
        key(options=BuildOptions(context_length=64)),
        key(options=BuildOptions(workspace_bytes=None)),
        key(options=BuildOptions(optimization_level=3)),
        key(recipe=engine_cache.RECIPE + 1),
    ]
    assert len({made.digest for made in (key(), *others)}) == len(others) + 1
    assert key().digest == key().digest


def test_the_cache_gives_what_was_saved(tmp_path: Path) -> None:
    cache, report = EngineCache(tmp_path / "engines"), {"image": 1e-5}
    assert cache.find(key()) is None
    assert cache.entries() == []
    path = cache.save(key(), b"engine", report)
    assert path.read_bytes() == b"engine"
    again = EngineCache(tmp_path / "engines")
    assert again.find(key()) == path
    assert again.find(key(version="10.3.1")) is None
    (entry,) = again.entries()
    assert (entry.path, entry.key, entry.checked) == (path, key().fields(), report)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    assert again.remove() == size
    assert again.find(key()) is None
    assert list((tmp_path / "engines").iterdir()) == []


def test_engines_that_are_not_as_they_were_saved_are_not_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EngineCache(tmp_path)
    path = cache.save(key(), b"engine", {"image": 1e-5})
    (record,) = tmp_path.glob("*.json")
    text = record.read_text()

    path.write_bytes(b"engime")
    assert cache.find(key()) is None
    assert f"{path} is damaged or missing" in caplog.text
    path.unlink()
    assert cache.find(key()) is None
    path.write_bytes(b"engine")
    assert cache.find(key()) == path

    for wrong in (
        text[:-20],
        "[]",
        "{}",
        text.replace('"image": 1e-05', ""),  # without checks
        text.replace('"Orin"', '"Thor"'),
        text.replace(f'"{path.name}"', f'"../{tmp_path.name}/{path.name}"'),
    ):
        assert wrong != text
        record.write_text(wrong)
        assert cache.find(key()) is None, wrong
    record.write_text(text)
    assert cache.find(key()) == path

    record.rename(tmp_path / f"{key(device='Thor').digest[:32]}.json")  # of another key
    assert cache.find(key(device="Thor")) is None


def test_an_engine_without_checks_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checks"):
        EngineCache(tmp_path).save(key(), b"engine", {})
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    first = cache.save(key(), b"engine", {"image": 1e-5})
    other = cache.save(key(device="Thor"), b"engine", {"image": 1e-5})
    second = cache.save(key(), b"another", {"image": 2e-5})
    assert cache.find(key()) == second
    assert cache.find(key(device="Thor")) == other
    assert not first.exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_builds_at_once_leave_a_whole_engine(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    threads = [
        threading.Thread(target=cache.save, args=(key(), bytes([i]) * 100_000, {"image": 1e-5}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.save(key(), b"last", {"image": 1e-5})
    found = cache.find(key())
    assert found is not None
    assert found.read_bytes() == b"last"
    assert not list(tmp_path.glob("*.tmp"))


def test_where_engines_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path))
    cache = EngineCache()
    assert cache.folder == tmp_path / "engines"
    file = cache.timing_cache(key(device="Orin (nvgpu)/8 GB"))
    assert file == tmp_path / "engines" / "tensorrt-10.3.0-Orin-nvgpu-8-GB-sm87.timings"
    assert cache.timing_cache(key(graphs=())) == cache.timing_cache(key())
    assert cache.timing_cache(key(version="10.16.1.11")) != cache.timing_cache(key())


def test_without_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_cache, "default_folder", lambda: None)
    cache = EngineCache()
    assert cache.find(key()) is None
    assert cache.entries() == []
    assert cache.remove() == 0
    for call in (lambda: cache.save(key(), b"", {"image": 0}), lambda: cache.timing_cache(key())):
        with pytest.raises(EdgeclipError, match="set EDGECLIP_CACHE"):
            call()
    (tmp_path / "engines").touch()
    with pytest.raises(EdgeclipError, match=r"cannot keep the engine in .*engines"):
        EngineCache(tmp_path / "engines").save(key(), b"engine", {"image": 0.0})
