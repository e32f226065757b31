"""Weight files of every format, wrapped state dicts, and pickles whose code must not run."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeclip.storage import sha256
from train.errors import ModelError
from train.models import weight_files
from train.models.weight_files import Ignored, join_sha256, read_file, read_weights

# The fewest keys that distinguish a whole model from an image tower.
MODEL = {
    "visual.conv1.weight": torch.ones(2),
    "token_embedding.weight": torch.full((3,), 2.0),
    "logit_scale": torch.tensor(4.6),
}
EMA = {key: value + 1 for key, value in MODEL.items()}
TOWER = {"conv1.weight": torch.ones(2), "class_embedding": torch.zeros(3)}


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def save_checkpoint(folder: Path, value: object, name: str = "w.pt") -> Path:
    torch.save(value, folder / name)
    return folder / name


def check_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value)


@pytest.mark.parametrize(
    ("value", "trail"),
    [
        (MODEL, ""),
        ({"state_dict": MODEL, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}}}, "state_dict"),
        ({"model": MODEL}, "model"),
        ({"net": MODEL}, "net"),
        ({"ema": MODEL}, "ema"),
        ({"model_ema": MODEL}, "model_ema"),
        ({"ema_state_dict": MODEL}, "ema_state_dict"),
        ({"model_state_dict": MODEL}, "model_state_dict"),
        ({"module": OrderedDict(MODEL), "ds_version": "0.16"}, "module"),  # DeepSpeed
        ({"state_dict": prefixed("model.", MODEL), "hyper_parameters": {}}, "state_dict > model."),
        ({"model": {"state_dict": MODEL}}, "model > state_dict"),
        ({"checkpoint": 1, "state_dict": {"model": prefixed("module.", MODEL)}},
         "state_dict > model > module."),
        (prefixed("module.", MODEL), "module."),
        (prefixed("net.", MODEL), "net."),
        (prefixed("_orig_mod.", MODEL), ""),
        (prefixed("module._orig_mod.model.", MODEL), "module. > model."),
        (prefixed("clip.", {k.replace("visual.", "visual._orig_mod."): v for k, v in MODEL.items()}),
         "clip."),
        (prefixed("_fsdp_wrapped_module.", MODEL), ""),
    ],
)  # fmt: skip
def test_wrappers_and_prefixes_are_unwrapped(
    tmp_path: Path, value: object, trail: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(tmp_path, value)
    weights = read_weights(path)
    check_same(weights.state, MODEL)
    assert (weights.label, weights.sha256) == ("w.pt", sha256(path))
    assert capsys.readouterr().err == (f"w.pt: taking {trail}\n" if trail else "")


def test_tensors_beside_a_prefix_are_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cover torch's AveragedModel and Lightning modules with metrics."""
    path = save_checkpoint(tmp_path, prefixed("module.", MODEL) | {"n_averaged": torch.tensor(7)})
    check_same(read_weights(path).state, MODEL)
    assert capsys.readouterr().err == "w.pt: taking module., leaving n_averaged\n"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"model": MODEL, "ema": EMA}, "ema"),
        ({"model_ema": prefixed("module.", EMA), "model": prefixed("module.", MODEL)}, "model_ema"),
        ({"state_dict": prefixed("model.", MODEL) | prefixed("ema_model.", EMA)}, "ema_model"),
        (MODEL | prefixed("ema.", EMA), "ema"),
        ({"state_dict": MODEL, "teacher": EMA}, "teacher"),
        (prefixed("model.", MODEL) | prefixed("student.", EMA), "student"),
    ],
)
def test_one_of_several_state_dicts_is_chosen_by_its_key(
    tmp_path: Path, value: object, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(tmp_path, value)
    first = read_weights(path)
    check_same(first.state, MODEL)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    if key.endswith(("ema", "ema_model")):  # known wrappers
        assert f"not {key} (chosen by w.pt#{key})" in message
    second = read_weights(f"{path}#{key}")
    check_same(second.state, EMA)
    assert second.label == f"w.pt#{key}"
    assert second.sha256 == join_sha256([sha256(path), key]) != first.sha256
    with pytest.raises(ModelError, match=r"w\.pt holds no state dict 'other': its keys are "):
        read_weights(f"{path}#other")


def test_a_file_may_have_a_hash_in_its_name(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"model": MODEL, "ema": EMA}, "run#ema")
    check_same(read_weights(path).state, MODEL)
    check_same(read_weights(f"{path}#ema").state, EMA)


@pytest.mark.parametrize(
    "value",
    [
        TOWER,
        prefixed("visual.", TOWER),
        prefixed("module.visual.", TOWER),
        {"state_dict": prefixed("model.visual.", TOWER)},
        # TeCoA's script saves a prompt and the tower.
        {"state_dict": {"pad_up": torch.zeros(1)}, "vision_encoder_state_dict": TOWER, "epoch": 1},
        {"model": MODEL, "vision_encoder_state_dict": prefixed("module.", TOWER)},
    ],
)
def test_image_towers(tmp_path: Path, value: dict[str, Any]) -> None:
    path = save_checkpoint(tmp_path, value)
    check_same(read_weights(path, "visual").state, prefixed("visual.", TOWER))
    if "model" in value:
        check_same(read_weights(path).state, MODEL)
    else:
        with pytest.raises(ModelError, match="holds an image tower alone: name it with --visual"):
            read_weights(path)


def test_a_whole_model_is_no_image_tower(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds a whole model: name it with --pretrained"):
        read_weights(save_checkpoint(tmp_path, MODEL), "visual")


def test_without_a_state_dict_the_keys_are_listed(tmp_path: Path) -> None:
    value = {"epoch": 3, "args": argparse.Namespace(lr=1), "losses": [1.0], "optimizer": {}}
    many = value | {f"more{i}": i for i in range(5)}
    with pytest.raises(ModelError) as caught:
        read_weights(save_checkpoint(tmp_path, many))
    assert str(caught.value) == (
        f"{tmp_path / 'w.pt'} holds no state dict: its keys are epoch (int), args (Ignored), "
        "losses (list), optimizer (dict), more0 (int), more1 (int) and 3 more; FILE#KEY chooses one"
    )
    for other, problem in (({}, "it is empty"), ([1, 2], "it is a list")):
        with pytest.raises(ModelError, match=f"holds no state dict: {problem}"):
            read_weights(save_checkpoint(tmp_path, other))


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    value: dict[str, Any] = {"epoch": 1}
    value["state_dict"] = value
    with pytest.raises(ModelError, match="holds no state dict"):
        read_weights(save_checkpoint(tmp_path, value))


def nested(levels: int) -> dict[str, Any]:
    """Build dictionaries, each of which holds the next one under every wrapper's name."""
    value: dict[str, Any] = {"epoch": 1}
    for _ in range(levels):
        value = dict.fromkeys(weight_files.WRAPPERS, value)
    return value


@pytest.mark.parametrize("levels", [0, 6])
def test_each_dictionary_is_searched_once(
    tmp_path: Path, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search a dictionary that holds itself under every name, and a tree with shared branches."""
    value = nested(levels)
    if not levels:
        value |= dict.fromkeys(weight_files.WRAPPERS, value)
    search, calls = weight_files._candidates, itertools.count(1)

    def counted(*arguments: Any) -> Any:
        assert next(calls) < 1000
        return search(*arguments)

    monkeypatch.setattr(weight_files, "_candidates", counted)
    for key in ("", "#model"):
        with pytest.raises(ModelError, match="holds no state dict"):
            read_weights(f"{save_checkpoint(tmp_path, value)}{key}")


def test_a_state_dict_under_two_names_is_found_by_either(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, {"model": MODEL, "ema": MODEL})
    for key in ("", "#model", "#ema"):
        check_same(read_weights(f"{path}{key}").state, MODEL)


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])  # of NumPy 1 and 2
@pytest.mark.parametrize(
    "value",
    [
        np.float64(71.5),
        np.float32(71.5),
        np.int64(71),
        np.bool_(True),
        np.array([1.5, 2.5], np.float16),
        np.array(["a", "b"]),
    ],
    ids=str,
)
def test_numpy_beside_the_weights(tmp_path: Path, value: Any, core: bytes) -> None:
    path = tmp_path / "w.pt"  # the old format of torch.save: the new one has checksums
    torch.save({"model": MODEL, "best_acc": value}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert re.search(rb"numpy\._?core", data)
    path.write_bytes(re.sub(rb"numpy\._?core", core, data))
    check_same(read_weights(path).state, MODEL)
    assert type(read_file(path)["best_acc"]) is Ignored


def test_arguments_beside_the_weights(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=1e-4, best=np.float64(3), out=Path("runs"), nested={"a": [None]})
    check_same(read_weights(save_checkpoint(tmp_path, {"model": MODEL, "args": args})).state, MODEL)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"])
def test_paths_of_any_system_beside_the_weights(tmp_path: Path, module: str, name: str) -> None:
    path = tmp_path / "w.pt"
    value = {"model": MODEL, "out": PurePosixPath("runs")}
    torch.save(value, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    written = f"{PurePosixPath.__module__}\nPurePosixPath\n".encode()
    assert written in data
    path.write_bytes(data.replace(written, f"{module}\n{name}\n".encode()))
    check_same(read_weights(path).state, MODEL)
    assert type(read_file(path)["out"]) is Ignored


class Forged:
    """Object that pickles as a call of `function`, and a state that is set on the result."""

    def __init__(self, function: Any, arguments: tuple, state: Any) -> None:
        self.reduced = function, arguments, state

    def __reduce__(self) -> tuple:
        return self.reduced


def test_a_forged_state_reaches_no_class(tmp_path: Path) -> None:
    """Forge a dtype whose bytes NumPy reads as object addresses; with other flags it crashes."""
    fields, flags = {"a": (np.dtype("O"), 0)}, 0
    dtype = Forged(np.dtype, ("V8", 0, 1), (3, "|", None, ("a",), fields, 8, 1, flags))
    rebuild = np.zeros(1).__reduce__()[0]
    array = Forged(rebuild, (np.ndarray, (0,), b"b"), (1, (1,), dtype, False, b"A" * 8))
    slots = (None, {"__class__": OrderedDict, "_str": 1})  # set one by one, without __setstate__
    values = {
        "array": array,
        "dtype": dtype,
        "arguments": Forged(argparse.Namespace, (), slots),
        "path": Forged(PurePosixPath, ("a",), slots),
    }
    path = save_checkpoint(tmp_path, {"model": MODEL} | values)
    contents = read_file(path)
    assert {key: type(contents[key]) for key in values} == dict.fromkeys(values, Ignored)
    assert not any(vars(contents[key]) for key in values)
    check_same(read_weights(path).state, MODEL)


class Command:
    """Object that pickles as a call of os.system, which creates a file."""

    def __init__(self, created: Path) -> None:
        self.created = created

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.created}",))


@pytest.mark.parametrize("kind", ["archive", "old", "pickle", "namespace", "array"])
def test_no_command_is_run(tmp_path: Path, kind: str) -> None:
    created, path = tmp_path / "created", tmp_path / "w.pt"
    value: Any = {"model": MODEL, "best_acc": Command(created)}
    if kind == "namespace":
        value["best_acc"] = argparse.Namespace(lr=Command(created))
    if kind == "array":
        value["best_acc"] = np.array([Command(created)], object)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value["best_acc"], protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind != "old")
    with pytest.raises(ModelError, match=r"holds pickled code \(posix.system\), which") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert not created.exists()


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.ckpt", "w", "w.safetensors"])
def test_safetensors_are_recognised_by_content(tmp_path: Path, name: str) -> None:
    save_file(MODEL, tmp_path / name)
    check_same(read_weights(tmp_path / name).state, MODEL)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_the_suffix_of_safetensors(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "w.safetensors"
    torch.save(MODEL, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ModelError, match=r"no safetensors but a PyTorch checkpoint: rename it"):
        read_weights(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_a_pointer_of_git_lfs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="pointer of Git LFS: fetch the weights with git lfs pull"):
        read_weights(tmp_path / name)


def shards(folder: Path, suffix: str = ".safetensors") -> Path:
    """Write MODEL in two shards, as transformers saves a large model, and return the index."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    table = {}
    for i, part in enumerate((["visual.conv1.weight"], ["token_embedding.weight", "logit_scale"])):
        name = f"{stem}-{i + 1:05}-of-00002{suffix}"
        state = {key: MODEL[key] for key in part}
        (save_file if suffix == ".safetensors" else torch.save)(state, folder / name)
        table |= dict.fromkeys(part, name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    index = shards(tmp_path, suffix)
    weights = read_weights(index)
    check_same(weights.state, MODEL)
    parts = sorted(tmp_path.glob(f"*-of-*{suffix}"))
    assert weights.sha256 == join_sha256([sha256(path) for path in (index, *parts)])
    with pytest.raises(ModelError, match=f"one of 2 shards: name their index, {index.name}"):
        read_weights(parts[1])
    torch.save([1], parts[1])
    if suffix == ".bin":
        with pytest.raises(ModelError, match=f"{parts[1].name} holds no state dict: it is a list"):
            read_weights(index)
    parts[1].unlink()
    with pytest.raises(ModelError, match=f"lacks {parts[1].name}, of the shards that"):
        read_weights(index)


def test_a_single_shard_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file(MODEL, path)
    check_same(read_weights(path).state, MODEL)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../w.pt"}}']
)
def test_broken_indices(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ModelError, match="no index of a sharded checkpoint") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_hashes_are_joined_in_lines(tmp_path: Path) -> None:
    assert join_sha256(["aa"]) == "aa"
    (tmp_path / "lines").write_text("aa\nbb\n")
    assert join_sha256(["aa", "bb"]) == sha256(tmp_path / "lines")
