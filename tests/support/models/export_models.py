"""Tiny models of every family in open_clip's folder form, each exported once per test session."""

from __future__ import annotations

import atexit
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import open_clip
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from open_clip.tokenizer import default_bpe
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from edgeclip.backends.onnx_runtime import open_session
from edgeclip.bundle import Bundle
from edgeclip.manifest import Manifest
from export import bundle
from export.bundle import export_bundle
from tests.support.models.text_towers import write_bert, write_roberta
from train.models.checkpoints import Source, load
from train.models.wording import wording
from train.progress import quiet

MERGES = 300
VOCABULARY = 512 + MERGES + 2
ROOT = Path(tempfile.mkdtemp(prefix="edgeclip-export-tests-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
T = TypeVar("T")


def cached(make: Callable[..., T]) -> Callable[..., T]:
    """Cache `make(folder, *arguments)` by its arguments; each result has its own new folder.

    An exception removes the folder, and is cached as well.
    """
    results: dict[tuple[Any, ...], T | Exception] = {}

    @wraps(make)
    def wrapper(*arguments: Any) -> T:
        if arguments not in results:
            folder = Path(tempfile.mkdtemp(dir=ROOT))
            try:
                results[arguments] = make(folder, *arguments)
            except BaseException as err:
                shutil.rmtree(folder)
                if not isinstance(err, Exception):
                    raise
                results[arguments] = err
        result = results[arguments]
        if isinstance(result, Exception):
            raise result
        return result

    return wrapper


TEXT = {
    "context_length": 24,
    "vocab_size": VOCABULARY,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
SHORT_TEXT = TEXT | {"layers": 1}  # tracing blocks takes most of an export's time
SIGLIP_TEXT = {
    "context_length": 16,
    "vocab_size": 200,
    "hf_tokenizer_name": "any/name",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "width": 96,
    "heads": 3,
    "layers": 1,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}

TRANSFORMERS_TEXT = {"hf_model_name": "text", "hf_tokenizer_name": "text", "context_length": 24}
TRANSFORMERS_TEXT |= {"hf_model_pretrained": False, "tokenizer_kwargs": {"subfolder": "text"}}

# Every kind of tower in open_clip, as small as possible.
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-avg": {
        "embed_dim": 48,
        "vision_cfg": VIT
        | {"layers": 1}
        | {"image_size": [32, 48], "pool_type": "avg", "no_ln_pre": True},
        "text_cfg": SHORT_TEXT,
        "custom_text": True,
    },
    "vit-quickgelu": {  # with other settings that affect the export
        "embed_dim": 48,
        "quick_gelu": True,
        "vision_cfg": VIT | {"layers": 1} | {"final_ln_after_pool": True, "pool_type": "avg"},
        "text_cfg": SHORT_TEXT | {"no_causal_mask": True},
        "custom_text": True,
    },
    "coca": {
        "embed_dim": 48,
        "custom_text": True,
        "vision_cfg": VIT
        | {"layers": 1, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 8}
        | {"output_tokens": True},
        "text_cfg": SHORT_TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {
            "context_length": 24,
            "vocab_size": VOCABULARY,
            "width": 48,
            "heads": 2,
            "layers": 1,
            "attn_pooler_heads": 2,
        },
    },
    "resnet": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": SHORT_TEXT,
    },
    "convnext": {
        "embed_dim": 48,
        "vision_cfg": {
            "timm_model_name": "tiny_convnext",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": SHORT_TEXT,
    },
    "efficientnet": {  # a feature map of 7 x 7, padded by TensorFlow's rule at an odd size
        "embed_dim": 48,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "tiny_efficientnet",
            "timm_pool": "avg",
            "timm_proj": "mlp",
            "image_size": 193,
        },
        "text_cfg": SHORT_TEXT,
    },
    "siglip": {
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "tiny_siglip",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": SIGLIP_TEXT,
    },
    "bert": {
        "embed_dim": 32,
        "vision_cfg": VIT | {"layers": 1},
        "text_cfg": TRANSFORMERS_TEXT | {"hf_pooler_type": "mean_pooler", "hf_proj_type": None},
    },
    "roberta": {
        "embed_dim": 48,
        "vision_cfg": VIT | {"layers": 1},
        "text_cfg": TRANSFORMERS_TEXT | {"hf_pooler_type": "cls_pooler", "hf_proj_type": "mlp"},
    },
}
WRITE_TEXT_TOWER = {"bert": write_bert, "roberta": write_roberta}
PREPROCESSING = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
WORDING = {
    "description": "a tiny model",
    "templates": ["a {}.", "the {}."],
    "null_templates": ["a {}."],
}


@timm.models.register_model
def tiny_siglip(pretrained: bool = False, **settings: Any) -> torch.nn.Module:
    """Create timm's smallest ViT with attention pooling, of two blocks."""
    return timm.create_model("test_vit3", depth=2, img_size=64, reg_tokens=0, **settings)


@timm.models.register_model
def tiny_convnext(pretrained: bool = False, **settings: Any) -> torch.nn.Module:
    return timm.create_model("test_convnext", depths=(1, 1, 1, 1), **settings)


@timm.models.register_model
def tiny_efficientnet(pretrained: bool = False, **settings: Any) -> torch.nn.Module:
    return timm.create_model("test_efficientnet", pad_type="same", **settings)


def write_bpe(path: Path, merges: int = MERGES) -> None:
    """Write the first merges of CLIP's byte-pair encoding, in open_clip's format."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: merges + 1]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def write_sentencepiece_like(folder: Path) -> None:
    """Write a tokenizer like SigLIP's: unigram, no start mark, padded with the end mark."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    text = "a photo of a small dog and two red cats, the quick brown fox jumps 0123456789"
    backend.train_from_iterator([text] * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_folder(
    folder: Path, family: str, *, seed: int = 1, embed_dim: int | None = None, **vision: Any
) -> Path:
    """Write a training run's folder, with random weights of which none is zero.

    embed_dim, vision: overrides of the family's configuration and of its image tower's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = dict(CONFIGS[family])
    if embed_dim is not None:
        model_cfg["embed_dim"] = embed_dim
    config = {
        "model_cfg": model_cfg | {"vision_cfg": model_cfg["vision_cfg"] | vision},
        "preprocess_cfg": PREPROCESSING,
        "edgeclip": WORDING,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    write_bpe(folder / "bpe.txt.gz")
    if family == "siglip":
        write_sentencepiece_like(folder)
    if family in WRITE_TEXT_TOWER:
        WRITE_TEXT_TOWER[family](folder / "text")
    torch.manual_seed(seed)
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # open_clip's way to find the folder text
        model = open_clip.create_model("local-dir:.", load_weights=False, pretrained_text=False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for value in state.values():
        if value.is_floating_point():  # CoCa leaves some uninitialised
            value.nan_to_num_(0, 0, 0).clamp_(-10, 10)
        if value.is_floating_point() and value.ndim:
            value += 0.02 * torch.randn_like(value).abs()  # positive, for batch norm's variances
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@dataclass(frozen=True)
class Exported:
    """A model in PyTorch and its bundle."""

    folder: Path
    source: Source
    bundle: Bundle
    encoders: Path  # folder of the fp32 encoders before the tokens' graph was split off


@cached
def exported(root: Path, family: str) -> Exported:
    folder = write_folder(root / family, family)
    source = load(str(folder), None)
    out, encoders = root / f"{family}-bundle", root / f"{family}-encoders"
    write_encoders = bundle._write_encoders

    def write_and_copy(staging: Path, *arguments: Any) -> Manifest:
        manifest = write_encoders(staging, *arguments)
        shutil.copytree(staging, encoders)
        return manifest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "_write_encoders", write_and_copy)
        export_bundle(source, out, wording(source))
    return Exported(folder, source, Bundle(out), encoders)


@cached
def quantized(folder: Path, family: str) -> Bundle:
    """Return a bundle of a tiny model in fp32, fp16, int8 and int8-weights."""
    tiny = exported(family)
    for path in (tiny.bundle.path, tiny.encoders):
        shutil.copytree(path, folder, dirs_exist_ok=True)
    precisions = ["fp32", "fp16", "int8", "int8-weights"]
    manifest = bundle._write_precisions(folder, tiny.source, tiny.bundle.manifest, precisions)
    Bundle.write_manifest(folder, manifest)
    return Bundle(folder)


def cosines(actual: NDArray[np.float32], expected: torch.Tensor) -> NDArray[np.float64]:
    a, b = actual.astype(np.float64), expected.numpy().astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def reuse_encoders(patch: pytest.MonkeyPatch, tiny: Exported, spoil: str = "") -> None:
    """Patch exports to copy the encoders of `tiny`, which saves their time.

    spoil: file whose weights are changed by a tenth.
    """

    def copy_files(staging: Path, *_: object) -> Manifest:
        for path in tiny.encoders.iterdir():
            shutil.copy(path, staging)
        if spoil:
            model = onnx.load(staging / spoil)
            for weights in model.graph.initializer:
                if weights.data_type == onnx.TensorProto.FLOAT and len(weights.dims) > 1:
                    array = 1.1 * onnx.numpy_helper.to_array(weights)
                    weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
            onnx.save(model, staging / spoil)
        return tiny.bundle.manifest

    patch.setattr(bundle, "_write_encoders", copy_files)


def run_graph(path: Path, output: str, value: Any) -> Any:
    """Return one output of a graph with one input, by ONNX Runtime."""
    session = open_session(path, "cpu")
    (actual,) = session.run([output], {session.get_inputs()[0].name: value})
    return actual


def product(path: Path, weight: NDArray[np.float32], *, gemm: bool = False) -> Path:
    """Write a graph x (N, K) -> x @ weight, with the weight stored in float32."""
    stored = np.ascontiguousarray(weight.T) if gemm else weight
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    if gemm:
        node = helper.make_node("Gemm", ["x", "w"], ["y"], name="product", transB=1)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(stored, "w")],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def folder_of_images(root: Path) -> Path:
    """Write a data set folder:PATH of two classes with different colours."""
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        folder = root / "test" / name
        folder.mkdir(parents=True)
        for i in range(4):
            noise = rng.integers(-30, 30, (40, 40, 3))
            image = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{i}.png")
    return root


def source_of(name: str, folder: Path) -> Source:
    """Load the model with random weights; SigLIP gets another tokenizer, its own needs a network."""
    if "SigLIP" not in name:
        return load(name, "random")
    config = {"model_cfg": open_clip.get_model_config(name)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    write_sentencepiece_like(folder)
    return load(str(folder), "random")
