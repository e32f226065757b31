"""Builds of TensorRT engines, by the modules of tests/support/gpu/fake_tensorrt.py."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgeclip.backends import engine_cache, tensorrt_module
from edgeclip.backends.engine_cache import BuildOptions, Gpu
from edgeclip.backends.tensorrt_builder import build_engine, engine_key
from edgeclip.errors import DeviceError
from tests.support.gpu import fake_tensorrt
from tests.support.models.schema1 import schema1_bundle
from tests.support.paths import GARMENTS

IMAGE = GARMENTS / "image_encoder.fp32.onnx"
ORIN = Gpu("Orin", (8, 7))
STANDARD = [name for name in fake_tensorrt.surfaces() if name.startswith("tensorrt-")]
RTX = [name for name in fake_tensorrt.surfaces() if name.startswith("tensorrt_rtx-")]

ONNX = Callable[..., Path]


@pytest.fixture(params=fake_tensorrt.surfaces())
def trt(request: pytest.FixtureRequest) -> ModuleType:
    """Return each recorded version of TensorRT in turn."""
    return fake_tensorrt.module(request.param)


@pytest.fixture
def jetpack() -> ModuleType:
    """Return TensorRT 10.3, as in JetPack 6.1 and 6.2."""
    return fake_tensorrt.module("tensorrt-10.3.0")


@pytest.fixture
def graph_of(tmp_path: Path) -> ONNX:
    """Return a factory of ONNX files from input shapes, where a string is a symbolic size."""

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
        model = helper.make_model(helper.make_graph(nodes, "model", values, outputs))
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return path

    return make


def built(
    trt: ModuleType, graph: Path, options: BuildOptions | None = None, **arguments: Any
) -> Any:
    """Build an engine, and return the settings that it records."""
    return json.loads(build_engine(graph, trt, options or BuildOptions(), **arguments))


def test_recorded_versions_reach_from_jetpack_to_the_newest_tensorrt() -> None:
    versions = {name.rpartition("-")[0]: [] for name in fake_tensorrt.surfaces()}
    for name in fake_tensorrt.surfaces():
        versions[name.rpartition("-")[0]].append(name.rpartition("-")[2].rsplit(".", 2)[0])
    assert {"10.13", "10.16", "11.4"} < set(versions["tensorrt"])
    assert "tensorrt-10.3.0" in STANDARD
    old, new = (fake_tensorrt.module(f"tensorrt-{x}") for x in ("10.3.0", "11.4.0.106"))
    # Differences that edgeclip has to handle.
    assert hasattr(old.BuilderFlag, "FP16")
    assert not hasattr(new.BuilderFlag, "FP16")
    assert old.NetworkDefinitionCreationFlag.STRONGLY_TYPED == 1
    assert new.NetworkDefinitionCreationFlag.STRONGLY_TYPED == 0


def test_a_fake_has_recorded_names_only(jetpack: ModuleType) -> None:
    with pytest.raises(AttributeError):
        _ = jetpack.IRuntimeConfig
    config = jetpack.IBuilderConfig()
    with pytest.raises(AttributeError):
        config.tiling_optimization_level = 1
    with pytest.raises(AttributeError):
        config.set_compute_capability(None, 0)


# Without it a CUDA graph cannot capture an engine of TensorRT-RTX.
SET_FLAGS = {"tensorrt": [], "tensorrt_rtx": ["REQUIRE_USER_ALLOCATION"]}


def test_engines_are_strongly_typed_without_precision_flags(trt: ModuleType) -> None:
    settings = built(trt, IMAGE)
    assert settings["network_flags"] == ["STRONGLY_TYPED"]
    assert settings["builder_flags"] == SET_FLAGS[trt.__name__]  # TF32, a default, is cleared
    assert settings["pools"] == {"WORKSPACE": 1 << 30}
    smallest, largest = [1, 3, 28, 28], [8, 3, 28, 28]
    assert settings["profiles"] == [{"pixels": [smallest, smallest, largest]}]


def test_options_reach_the_builder(trt: ModuleType) -> None:
    options = BuildOptions(max_batch=32, opt_batch=4, workspace_bytes=1 << 28, optimization_level=5)
    settings = built(trt, IMAGE, options)
    assert [shape[0] for shape in settings["profiles"][0]["pixels"]] == [1, 4, 32]
    assert settings["pools"] == {"WORKSPACE": 1 << 28}
    assert settings["optimization_level"] == 5
    settings = built(trt, IMAGE, BuildOptions(workspace_bytes=None))
    assert settings["pools"] == {}
    assert settings["optimization_level"] == 3


def test_unrequested_outputs_are_pruned(trt: ModuleType) -> None:
    image = schema1_bundle().path / "image_encoder.fp32.onnx"
    assert built(trt, image)["outputs"] == ["embedding", "tokens"]
    assert built(trt, image, BuildOptions(outputs=("embedding",)))["outputs"] == ["embedding"]


def test_every_tensorrt_has_the_names_that_run_an_engine(trt: ModuleType) -> None:
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


def test_optimization_profiles(jetpack: ModuleType, graph_of: ONNX) -> None:
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
    assert fused[0]["classes"] == [[5, 32], [100, 32], [32768, 32]]  # at least top 5
    assert "null_text" not in fused[0]  # its size is known
    assert profile(pixels=(1, 3, 8, 8)) == []
    with pytest.raises(DeviceError, match="a range for axis 2 of input 'pixels'"):
        profile(pixels=("batch", 3, "height", 8))


@pytest.mark.parametrize("name", RTX)
def test_tensorrt_rtx_builds_for_absent_gpus(name: str) -> None:
    trt = fake_tensorrt.module(name)
    assert built(trt, IMAGE)["capabilities"] == []
    assert built(trt, IMAGE, capability=(8, 6))["capabilities"] == ["SM86"]
    with pytest.raises(DeviceError, match=r"builds for SM75, SM80, SM86, SM89, SM120.*, not SM87"):
        build_engine(IMAGE, trt, BuildOptions(), capability=(8, 7))


@pytest.mark.parametrize("name", STANDARD)
def test_tensorrt_builds_for_the_present_gpu_only(name: str) -> None:
    trt = fake_tensorrt.module(name)
    with pytest.raises(DeviceError, match=r"this machine only.*TensorRT-RTX: pip install") as err:
        build_engine(IMAGE, trt, BuildOptions(), capability=(8, 6))
    assert "\n" not in str(err.value)
    assert trt._fake.builds == []


@pytest.mark.parametrize("name", STANDARD)
def test_kernel_timings_are_cached(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "orin.timings"
    trt = fake_tensorrt.module(name)
    assert built(trt, IMAGE, timing_cache=path)["known_timings"] == ""
    text = GARMENTS / "text_encoder.fp32.onnx"
    assert built(trt, text, timing_cache=path)["known_timings"] == f"{IMAGE.name}\n"
    after = built(trt, IMAGE, timing_cache=path)["known_timings"]
    assert after == f"{IMAGE.name}\n{text.name}\n"
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left
    assert built(trt, IMAGE)["known_timings"] is None


@pytest.mark.parametrize("name", RTX)
def test_tensorrt_rtx_has_no_timings(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rtx.timings"
    assert built(fake_tensorrt.module(name), IMAGE, timing_cache=path)["known_timings"] is None
    assert not path.exists()


@pytest.mark.parametrize("data", [b"garbage", b"timings 9.1 GPU\nold\n", b"timings 10.3.0 Other\n"])
def test_damaged_or_foreign_timings_are_replaced(
    data: bytes, jetpack: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "orin.timings"
    path.write_bytes(data)
    with caplog.at_level(logging.INFO):
        assert built(jetpack, IMAGE, timing_cache=path)["known_timings"] == ""
    assert f"{path} is damaged, or from another TensorRT or GPU" in caplog.text
    assert path.read_bytes() == f"timings 10.3.0 GPU\n{IMAGE.name}\n".encode()


def test_a_build_survives_an_unwritable_timing_cache(
    jetpack: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert built(jetpack, IMAGE, timing_cache=tmp_path / "file" / "orin.timings")
    assert "cannot write kernel timings" in caplog.text


def test_a_failed_build_writes_no_timings(jetpack: ModuleType, tmp_path: Path) -> None:
    jetpack._fake.refuses = "no kernel"
    with pytest.raises(DeviceError):
        build_engine(IMAGE, jetpack, BuildOptions(), timing_cache=tmp_path / "orin.timings")
    assert not list(tmp_path.iterdir())


def test_progress_reports_nested_phases(trt: ModuleType) -> None:
    calls: list[tuple[str, int, int]] = []
    build_engine(IMAGE, trt, BuildOptions(), progress=lambda *call: calls.append(call))
    inner = "Building engine > Timing graph nodes"
    assert list(dict.fromkeys(calls)) == [
        ("Building engine", 0, 1),
        *((inner, done, 3) for done in range(4)),
        ("Building engine", 1, 1),
    ]


def test_an_exception_in_the_progress_callback_stops_the_build(trt: ModuleType) -> None:
    def progress(_: str, done: int, __: int) -> None:
        if done == 2:
            raise ZeroDivisionError("in the callback")

    with pytest.raises(ZeroDivisionError, match="in the callback"):
        build_engine(IMAGE, trt, BuildOptions(), progress=progress)
    assert trt._fake.cancelled


def test_ctrl_c_stops_the_build(trt: ModuleType) -> None:
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
    assert build_engine(IMAGE, trt, BuildOptions())  # no lock is left


def test_unsupported_operators_are_one_line(trt: ModuleType, graph_of: ONNX) -> None:
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


def test_files_that_are_not_onnx(jetpack: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"golden.npz: .*MODEL_DESERIALIZE_FAILED"):
        build_engine(GARMENTS / "golden.npz", jetpack, BuildOptions())
    with pytest.raises(DeviceError, match=r"none.onnx does not exist"):
        build_engine(tmp_path / "none.onnx", jetpack, BuildOptions())


def test_external_weights_are_found_from_any_folder(jetpack: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    model = onnx.load(IMAGE)
    onnx.save(model, path, save_as_external_data=True, location="graph.onnx.data")
    assert built(jetpack, path)["graph"] == str(path)
    (tmp_path / "graph.onnx.data").unlink()
    with pytest.raises(DeviceError, match=r"graph.onnx.data"):
        build_engine(path, jetpack, BuildOptions())


def test_the_last_error_is_reported(trt: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    trt._fake.refuses = "Error Code 10: Could not find any\n implementation for node x"
    with pytest.raises(DeviceError) as err:
        build_engine(IMAGE, trt, BuildOptions())
    assert str(err.value) == (
        f"{trt.__name__} {trt.__version__} cannot build {IMAGE}: "
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
    assert tensorrt_module.trt_logger(trt).last_error == ""


def test_without_a_driver(trt: ModuleType) -> None:
    trt._fake.driver = False
    with pytest.raises(DeviceError) as err:
        build_engine(IMAGE, trt, BuildOptions())
    assert str(err.value) == (
        f"{trt.__name__} {trt.__version__} does not work here: "
        "CUDA initialization failure with error: 35"
    )


def test_the_key_contains_the_settings_of_the_build(trt: ModuleType) -> None:
    key = engine_key(["11" * 32], trt, ORIN, BuildOptions(max_batch=4))
    assert key.fields() == {
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
        "flags": ["STRONGLY_TYPED", *SET_FLAGS[trt.__name__], "not TF32"],
        "recipe": engine_cache.RECIPE,
    }
