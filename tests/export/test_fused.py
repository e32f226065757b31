"""The fused graph: image to answer, held to the runtime and to NumPy in float64."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import edgeclip
from edgeclip.bundle import EMBEDDED, Bundle
from edgeclip.manifest import ImageSpec, Variant
from edgeclip.onnx_file import locations
from edgeclip.purify import CosPurifier, DiffPurifier
from export import ExportError, bundle, fused
from export.__main__ import main as export_main
from export.bundle import export_bundle
from export.checks import evidence
from export.fused import main, write_fused
from export.graphs import fp16, save
from export.graphs.fused import Head, fuse
from tests.support.export_models import Exported, exported, made_once, reuse_encoders
from tests.support.paths import EXAMPLES
from train.models.wording import wording

Array = NDArray[Any]
PURIFIERS = (None, CosPurifier(), CosPurifier(1, 0.3), CosPurifier(3, 0.05), CosPurifier(7, 2.0))


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def unit_rows(count: int, dim: int, seed: int = 1) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def label_set(runtime: edgeclip.Runtime, rows: NDArray[np.float32]) -> edgeclip.LabelSet:
    names = tuple(f"class {i}" for i in range(len(rows)))
    null_scores = rows @ runtime.bundle.null_text
    return edgeclip.LabelSet(names, rows, null_scores, runtime.text_identity())


def images_of(bundle: Bundle, count: int) -> NDArray[np.uint8]:
    """Noise, each of another range."""
    random = np.random.default_rng(count)
    size = bundle.manifest.image.size
    tops = random.integers(2, 256, (count, 1, 1, 1))
    return random.integers(0, tops, (count, *size, 3)).astype(np.uint8)


def answers(
    runtime: edgeclip.Runtime, images: Array, labels: edgeclip.LabelSet, k: int
) -> tuple[Array, Array]:
    """Probabilities and indices (N, k) of the runtime."""
    found = runtime.classify(list(images), labels, top_k=k)
    scores = [[p.score for p in row] for row in found]
    return np.array(scores), np.array([[p.index for p in row] for row in found])


def runtime_of(made: Bundle, purifier: CosPurifier | None, precision: str = "fp32") -> Any:
    return edgeclip.Runtime(made, device="cpu", precision=precision, purify=purifier, threads=1)


@pytest.mark.parametrize("purifier", PURIFIERS, ids=str)
@pytest.mark.parametrize("family", ["vit", "vit-avg", "siglip"])  # vit-avg is not square
def test_answers_are_the_runtimes(
    family: str, purifier: CosPurifier | None, tmp_path: Path
) -> None:
    made = exported(family).bundle
    runtime, path = runtime_of(made, purifier), tmp_path / "fused.onnx"
    assert write_fused(runtime, path, Head(purifier)) < 1e-5
    session = open_graph(path)
    for batch, count in itertools.product((1, 2, 33), (5, 1000)):
        labels = label_set(runtime, unit_rows(count, made.manifest.embed_dim))
        images = images_of(made, batch)
        wanted, indices = answers(runtime, images, labels, 5)
        found = session.run(None, {"image": images, "classes": labels.embeddings})
        np.testing.assert_allclose(found[0], wanted, atol=1e-5)
        np.testing.assert_array_equal(found[1], indices)
        assert (found[0].dtype, found[1].dtype) == (np.float32, np.int32)


def test_purification_changes_the_answers() -> None:
    """What the tests above compare is not the same for all settings."""
    made = exported("vit").bundle
    images = images_of(made, 3)
    scores = []
    for purifier in PURIFIERS:
        runtime = runtime_of(made, purifier)
        labels = label_set(runtime, unit_rows(50, made.manifest.embed_dim))
        scores.append(answers(runtime, images, labels, 5)[0])
    for (i, one), (j, other) in itertools.combinations(enumerate(scores), 2):
        if (i, j) != (0, 1):  # ten steps of 30 are the identity
            assert np.abs(one - other).max() > 1e-3


# What follows is the head alone: an encoder that gives the pixels themselves.
SIZE, DIM = (2, 3), 18
SCALE = 20.0


def pixels_as_embeddings() -> ir.Model:
    """An encoder with a second output, and with a weight that only this one needs."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["embedding"]),
            helper.make_node("Add", ["embedding", "unused"], ["image"]),  # of a name that is taken
            helper.make_node("Mul", ["image", "image"], ["tokens"]),
        ],
        "g",
        [info("pixels", TensorProto.FLOAT, ["batch", 3, *SIZE])],
        [info(name, TensorProto.FLOAT, ["batch", DIM]) for name in ("embedding", "tokens")],
        [onnx.numpy_helper.from_array(np.ones(DIM, np.float32), "unused")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(made)


def run_head(z: Array, null_text: Array, purifier: CosPurifier | None) -> Array:
    """Probabilities (N, DIM) of the unit vectors along each axis as classes."""
    plain = ImageSpec(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    head = Head(purifier, top_k=None)
    model = fuse(pixels_as_embeddings(), plain, null_text, SCALE, "float32", head)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    given = {"image": (255 * z).reshape(-1, 3, *SIZE), "classes": np.eye(DIM, dtype=np.float32)}
    (found,) = session.run(["probabilities"], given)
    return found


def step_by_step(z: Array, null_text: Array, purifier: CosPurifier | None) -> Array:
    """The same in float64, by the published steps (arXiv 2502.18176) and in all dimensions."""
    t = null_text.astype(np.float64) / np.linalg.norm(null_text.astype(np.float64))
    probabilities = []
    for row in (np.float32(255) * z / np.float32(255)).astype(np.float64):
        u = row / np.linalg.norm(row)
        for _ in range(purifier.steps if purifier else 0):
            across = t - (u @ t) * u
            if np.linalg.norm(across) < 1e-5:
                break
            w = across / np.linalg.norm(across)
            u = (u + purifier.step_size * w) / np.hypot(1, purifier.step_size)
            u /= np.linalg.norm(u)  # or its rounding grows with every step
        power = np.exp(SCALE * (u - u.max()))
        probabilities.append(power / power.sum())
    return np.array(probabilities)


def at_angle(t: Array, angle: float, seed: int = 0) -> NDArray[np.float32]:
    """A vector at this angle to t, of norm 7."""
    other = np.random.default_rng(seed).standard_normal(DIM)
    other -= (other @ t) / (t @ t) * t
    other /= np.linalg.norm(other)
    return (7 * (np.cos(angle) * t / np.linalg.norm(t) + np.sin(angle) * other)).astype(np.float32)


@pytest.mark.parametrize("size", [0.0, 1e-7, 0.01, 0.5, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10, 101])
def test_closed_form_is_every_step_of_the_loop(steps: int, size: float) -> None:
    t = unit_rows(1, DIM)[0]
    angles = (0.03, 0.4, 1.0, 1.3, 1.5, 1.6, 2.5, 3.1)
    z = np.stack([at_angle(t, angle, seed) for seed, angle in enumerate(angles)])
    purifier = CosPurifier(steps, size)
    found, wanted = (compute(z, t, purifier) for compute in (run_head, step_by_step))
    np.testing.assert_allclose(found, wanted, atol=5e-6)


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
@pytest.mark.parametrize("size", [0.01, 30.0])
def test_nearly_parallel_to_the_null_text(steps: int, size: float) -> None:
    t = unit_rows(1, DIM)[0]
    purifier = CosPurifier(steps, size)
    for sine in (1e-2, 1e-3, 1e-4):
        for angle in (sine, np.pi - sine):
            z = at_angle(t, angle)[None]
            found, wanted = (compute(z, t, purifier) for compute in (run_head, step_by_step))
            # Of the direction across float32 has what is left of 1e-7 of the embedding.
            np.testing.assert_allclose(found, wanted, atol=1e-6 + 1e-6 / sine)
    still = np.stack([7 * t, -7 * t, at_angle(t, 1e-6), at_angle(t, np.pi - 1e-6)])
    np.testing.assert_allclose(
        run_head(still, t, purifier), step_by_step(still, t, None), atol=1e-6
    )


def test_exactly_orthogonal_and_without_a_direction() -> None:
    t = np.zeros(DIM, np.float32)
    t[3] = 1
    z = np.zeros((2, DIM), np.float32)
    z[:, 5] = 4, -1e-3
    for purifier in (None, CosPurifier(1, 1.0), CosPurifier(5, 0.1), CosPurifier()):
        wanted = step_by_step(z, t, purifier)
        np.testing.assert_allclose(run_head(z, t, purifier), wanted, atol=2e-6)
        # As the runtime, which refuses it, a graph must not make an answer of nothing.
        assert np.isnan(run_head(np.zeros_like(z), t, purifier)).all()


def test_only_what_an_answer_needs_is_left(tmp_path: Path) -> None:
    plain = ImageSpec(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    made = ir.to_proto(fuse(pixels_as_embeddings(), plain, np.ones(DIM), 1.0, "uint8", Head()))
    assert "unused" not in {tensor.name for tensor in made.graph.initializer}
    # The same of a real encoder, in whose file the weights of `tokens` are.
    write_fused(runtime_of(exported("vit").bundle, None), tmp_path / "f.onnx", Head())
    graph = onnx.load(tmp_path / "f.onnx").graph
    taken = {name for node in graph.node for name in node.input}
    taken |= {output.name for output in graph.output}
    assert all(taken & set(node.output) for node in graph.node)
    assert {tensor.name for tensor in graph.initializer} <= taken
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dims == {
        "image": ["batch", 32, 32, 3],
        "classes": ["classes", 48],
        "probabilities": ["batch", 5],
        "indices": ["batch", 5],
    }


def test_labels_are_swapped_without_a_new_graph_or_built_in(tmp_path: Path) -> None:
    made = exported("vit").bundle
    purifier = CosPurifier(3, 0.2)
    runtime = runtime_of(made, purifier)
    write_fused(runtime, tmp_path / "open.onnx", Head(purifier, top_k=2))
    session, images = open_graph(tmp_path / "open.onnx"), images_of(made, 3)
    for names in (["a dog", "a cat"], ["x", "y", "z"], [f"thing {i}" for i in range(40)]):
        labels = runtime.labels(names)
        wanted, indices = answers(runtime, images, labels, 2)
        found = session.run(None, {"image": images, "classes": labels.embeddings})
        np.testing.assert_allclose(found[0], wanted, atol=1e-5)
        np.testing.assert_array_equal(found[1], indices)

        write_fused(runtime, tmp_path / "baked.onnx", Head(purifier, 5, labels))
        baked = open_graph(tmp_path / "baked.onnx")
        probabilities, found_indices = baked.run(None, {"image": images})
        wanted, indices = answers(runtime, images, labels, 5)  # or all, where there are fewer
        np.testing.assert_allclose(probabilities, wanted, atol=1e-5)
        np.testing.assert_array_equal(found_indices, indices)
        assert json.loads(baked.get_modelmeta().custom_metadata_map["labels"]) == names
    with pytest.raises(Exception, match="TopK"):
        session.run(None, {"image": images, "classes": unit_rows(1, 48)})


@pytest.mark.parametrize("input_type", ["uint8", "float32"])
def test_probabilities_of_all_classes_are_in_their_order(tmp_path: Path, input_type: str) -> None:
    made = exported("vit-avg").bundle
    runtime = runtime_of(made, None)
    for labels in (runtime.labels(["only"]), runtime.labels(["a", "b", "c"]), None):
        head = Head(top_k=None, labels=labels)
        write_fused(runtime, tmp_path / "f.onnx", head, input_type=input_type)
        session, images = open_graph(tmp_path / "f.onnx"), images_of(made, 2)
        known = labels or label_set(runtime, unit_rows(7, made.manifest.embed_dim))
        given = {"image": images}
        if input_type == "float32":
            given = {"image": images.transpose(0, 3, 1, 2).astype(np.float32)}
        if labels is None:
            given["classes"] = known.embeddings
        (found,) = session.run(None, given)
        wanted, indices = answers(runtime, images, known, len(known))
        np.testing.assert_allclose(np.take_along_axis(found, indices, 1), wanted, atol=1e-5)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


@made_once
def halved(folder: Path) -> Bundle:
    """The embedded bundle (fp32 and int8) with an image encoder in fp16."""
    shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)
    manifest = Bundle(folder).manifest
    fp16.to_fp16(folder / "image_encoder.fp32.onnx", folder / "image_encoder.fp16.onnx")
    half = Variant("image_encoder.fp16.onnx", "text_encoder.fp32.onnx")
    precisions = {**manifest.precisions, "fp16": half}
    Bundle.write_manifest(folder, dataclasses.replace(manifest, precisions=precisions))
    return Bundle(folder)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions(precision: str, tmp_path: Path, fashion: tuple[Array, Array]) -> None:
    purifier = CosPurifier(3, 0.1)
    runtime = runtime_of(halved(), purifier, precision)
    write_fused(runtime, tmp_path / "f.onnx", Head(purifier))
    session = open_graph(tmp_path / "f.onnx")
    batch = session.get_inputs()[0].shape[0]
    assert batch == (1 if precision == "int8" else "batch")  # its ranges are those of one image
    labels = runtime.labels(edgeclip.read_labels(EXAMPLES / "labels.txt"))
    for image in fashion[0][:20]:
        given = {"image": image[None], "classes": labels.embeddings}
        found, wanted = session.run(None, given), answers(runtime, image[None], labels, 5)
        np.testing.assert_allclose(found[0], wanted[0], atol=2e-3)
        assert found[1][0, 0] == wanted[1][0, 0]


def test_a_bundle_lists_its_fused_graph_which_shares_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("vit")
    folder = tmp_path / "source"
    shutil.copytree(made.bundle.path, folder)
    monkeypatch.setattr(save, "SINGLE_FILE", 1000)
    encoder = folder / "image_encoder.fp32.onnx"
    save.save(ir.load(encoder), encoder)
    assert locations(encoder) == {f"{encoder.name}.data"}
    Bundle.write_manifest(folder, made.bundle.manifest)

    reuse_encoders(monkeypatch, Exported(made.folder, made.source, Bundle(folder)))
    purifier = CosPurifier(1, 0.4)
    words = wording(made.source)
    export_bundle(made.source, tmp_path / "b", words, purification=purifier, fused=True)
    result = Bundle(tmp_path / "b")
    path = result.file("fused.fp32.onnx")  # which checks its sha256
    assert locations(path) == {f"{encoder.name}.data"}
    assert path.stat().st_size < 0.2 * (tmp_path / "b" / f"{encoder.name}.data").stat().st_size
    runtime, images = runtime_of(result, purifier), images_of(result, 3)
    labels = label_set(runtime, unit_rows(9, 48))
    given = {"image": images, "classes": labels.embeddings}
    wanted = answers(runtime, images, labels, 5)[0]
    np.testing.assert_allclose(open_graph(path).run(None, given)[0], wanted, atol=1e-5)

    out = tmp_path / "elsewhere" / "f.onnx"  # with weights of its own
    out.parent.mkdir()
    options = ["--purify", "cos", "--steps", "1", "--step-size", "0.4"]
    assert main([str(result.path), "-o", str(out), *options]) == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["f.onnx", "f.onnx.data"]
    assert {p.stat().st_mode & 0o777 for p in out.parent.iterdir()} == {path.stat().st_mode & 0o777}
    assert locations(out) == {"f.onnx.data"}
    shutil.rmtree(result.path)
    np.testing.assert_allclose(open_graph(out).run(None, given)[0], wanted, atol=1e-5)


def test_a_graph_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    runtime = runtime_of(exported("vit").bundle, None)
    for head in (Head(CosPurifier(1, 0.5)), Head(CosPurifier(1, 0.5), None)):
        with pytest.raises(ExportError, match=r"f.onnx does not match the runtime: a"):
            write_fused(runtime, tmp_path / "f.onnx", head)


def test_a_failed_comparison_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.onnx"
    out.write_text("old")
    monkeypatch.setattr(fused, "compare", lambda *_: float("nan"))
    assert main([str(exported("vit").bundle.path), "-o", str(out), "--force"]) == 2
    assert "a probability differs by nan" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_classes_for_another_runtime(tmp_path: Path) -> None:
    source = str(exported("vit").bundle.path)
    labels = tmp_path / "labels.txt"
    labels.write_text("# comment\ncat\n\ndog | a dog | the puppy\n")
    wanted = runtime_of(Bundle(source), None).labels(edgeclip.read_labels(labels)).embeddings
    for name in ("classes.npy", "classes.bin"):
        assert main([source, "--classes-for", str(labels), "-o", str(tmp_path / name)]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "classes.npy"), wanted)
    raw = np.fromfile(tmp_path / "classes.bin", "<f4").reshape(2, -1)
    np.testing.assert_array_equal(raw, wanted)
    again = tmp_path / "worded.npy"
    given = ["--classes-for", str(labels), "-o", str(again), "--template", "my own {}"]
    assert main([source, *given]) == 0
    assert np.abs(np.load(again)[0] - wanted[0]).max() > 1e-4
    np.testing.assert_array_equal(np.load(again)[1], wanted[1])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-o", "old.onnx"], "old.onnx exists: add --force to replace it"),
        (["-o", "f.pb"], "f.pb: name a file that ends in .onnx"),
        (["-o", "f.onnx", "--classes-for", "l"], "f.onnx: name a file that ends in .npy or .bin"),
        (["-o", "f.npy", "--classes-for", "l", "--labels", "l"], "use one of the two"),
        (["-o", "f.onnx", "--steps", "3"], "--steps and --step-size need --purify cos"),
        (["-o", "f.onnx", "--precision", "int8"], "has no int8 encoders; it has fp32"),
        (["-o", "f.onnx", "--labels", "none.txt"], "none.txt: No such file or directory"),
        (["-o", "nowhere/f.onnx"], "No such file or directory"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.onnx").write_text("old")
    assert main([str(exported("vit").bundle.path), *arguments]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert line in err[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]


def test_a_graph_replaces_the_target_of_a_link_and_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "SINGLE_FILE", 0)  # with its weights beside it
    target, link = tmp_path / "target.onnx", tmp_path / "link.onnx"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to("target.onnx")
    command = [str(exported("vit").bundle.path), "-o", str(link)]
    assert main(command) == 2
    assert target.read_text() == "old"
    assert main([*command, "--force"]) == 0
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert locations(link) == {"target.onnx.data"}
    open_graph(link)
    names = {"link.onnx", "target.onnx", "target.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_weights_of_another_graph_are_replaced_only_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.onnx.data").write_text("mine")
    assert main([str(exported("vit").bundle.path), "-o", str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err.endswith("a.onnx.data exists: add --force to replace it\n")
    assert (tmp_path / "a.onnx.data").read_text() == "mine"


@pytest.mark.parametrize("kind", ["labels", "classes", "template", "bundle", "weights"])
def test_inputs_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = Path(shutil.copytree(exported("vit").bundle.path, tmp_path / "bundle"))
    text = tmp_path / ("given.npy" if kind == "classes" else "given.onnx")
    text.write_text("a {}\n")
    name = next(name for name in Bundle(source).manifest.files if name.startswith("image_encoder"))
    output, more = {
        "labels": (text, ["--labels", text]),
        "classes": (text, ["--classes-for", text]),
        "template": (text, ["--template", text, "--labels", EXAMPLES / "labels.txt"]),
        "bundle": (source / name, []),
        "weights": (tmp_path / "out.onnx", ["--labels", tmp_path / "out.onnx.data"]),
    }[kind]
    if kind == "weights":
        (tmp_path / "out.onnx.data").write_text("a\n")
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([str(source), "-o", str(output), "--force", *map(str, more)]) == 2
    assert "that would destroy the input" in capsys.readouterr().err
    for path, before in contents.items():
        assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".onnx", ".npy", ".bin"])
def test_a_fifo_takes_what_a_file_takes(tmp_path: Path, suffix: str) -> None:
    labels = str(EXAMPLES / "labels.txt")
    more = [] if suffix == ".onnx" else ["--classes-for", labels]
    fifo, file = tmp_path / f"fifo{suffix}", tmp_path / f"file{suffix}"
    os.mkfifo(fifo)
    command = [str(exported("vit").bundle.path), *more, "-o"]
    assert main([*command, str(file)]) == 0
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert main([*command, str(fifo)]) == 0
    reader.join()
    assert found == [file.read_bytes()]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {fifo.name, file.name}


def test_a_fifo_takes_no_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(save, "SINGLE_FILE", 0)
    os.mkfifo(tmp_path / "fifo.onnx")
    assert main([str(exported("vit").bundle.path), "-o", str(tmp_path / "fifo.onnx")]) == 2
    assert "takes one file, but large weights need a second" in capsys.readouterr().err


def test_the_command_makes_one_and_refuses_a_diffusion_prior_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = exported("vit"), tmp_path / "bundle"
    reuse_encoders(monkeypatch, made)
    assert export_main([str(made.folder), "-o", str(out)]) == 0
    assert not list(out.glob("fused*"))  # nobody asked for one
    assert export_main([str(made.folder), "-o", str(out), "--fused", "--force"]) == 0
    assert "fused.fp32.onnx" in Bundle(out).manifest.files

    monkeypatch.setattr(evidence, "read", lambda *_: ((), DiffPurifier()))
    monkeypatch.setattr(bundle, "export_bundle", pytest.fail)
    assert export_main([str(made.folder), "-o", str(tmp_path / "b"), "--fused"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: the bundle recommends CLIPure-Diff, which fused graphs do not support"
    )


def test_openvino_gives_the_runtimes_answers(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    made, purifier = exported("siglip").bundle, CosPurifier(3, 0.2)
    runtime = runtime_of(made, purifier)
    write_fused(runtime, tmp_path / "f.onnx", Head(purifier))
    precise = {"INFERENCE_PRECISION_HINT": "f32"}  # or it takes bfloat16 where the CPU has that
    compiled = openvino.Core().compile_model(tmp_path / "f.onnx", "CPU", precise)
    labels = label_set(runtime, unit_rows(30, made.manifest.embed_dim))
    for batch in (1, 4):
        images = images_of(made, batch)
        found = compiled({"image": images, "classes": labels.embeddings})
        wanted, indices = answers(runtime, images, labels, 5)
        np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-5)
        np.testing.assert_array_equal(found["indices"], indices)


@pytest.mark.parametrize(("precision", "input_type"), [("fp32", "float32"), ("fp16", "uint8")])
def test_tensorrt_builds_an_engine_of_it(tmp_path: Path, precision: str, input_type: str) -> None:
    """Strongly typed, which needs neither a GPU nor a driver; what it answers is not known."""
    trt = pytest.importorskip("tensorrt_rtx")
    purifier, path = CosPurifier(3, 0.2), tmp_path / "f.onnx"
    runtime = runtime_of(halved(), purifier, precision)
    write_fused(runtime, path, Head(purifier), input_type=input_type)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    size = (28, 28, 3) if input_type == "uint8" else (3, 28, 28)
    profile.set_shape("image", (1, *size), (4, *size), (8, *size))
    profile.set_shape("classes", (5, 128), (10, 128), (1000, 128))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    assert [(o.name, o.dtype, tuple(o.shape)) for o in outputs] == [
        ("probabilities", trt.DataType.FLOAT, (-1, 5)),
        ("indices", trt.DataType.INT32, (-1, 5)),
    ]
