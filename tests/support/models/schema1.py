"""A bundle of schema 1, with the outputs that edgeclip had for it.

tests/vectors/schema1.zip and schema1.npz were written once, by the last exporter of schema 1 (commit
3605367), with its tests/ and its root on PYTHONPATH:

    import numpy as np, shutil, sys
    from pathlib import Path
    import export_models as m
    from edgeclip import Runtime
    from export.bundle import export_bundle, wording
    from safetensors.torch import load_file

    folder = Path(sys.argv[1])
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = m.TEXT | {"width": 16, "layers": 1, "vocab_size": 546}
    m.CONFIGS["vit"] = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    m.write_bpe.__defaults__ = (32,)  # merges
    path = m.write_folder(folder / "model", "vit") / "open_clip_model.safetensors"
    m.save_file({k: (32 * v).round() / 32 for k, v in load_file(path).items()}, path)
    source = m.load(str(path.parent), None)
    bundle = folder / "schema1"
    export_bundle(source, bundle, wording(source), precisions=["fp32", "int8"])
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    out = {"image": image}
    for p in ("fp32", "int8"):
        runtime = Runtime(bundle, device="cpu", precision=p)
        pixels = runtime.preprocess([image])
        answer = runtime.classify(image, ["a dog", "a cat", "a car"])
        out[f"embedding_{p}"] = runtime._image_encoder.embed(pixels)
        out[f"tokens_{p}"] = runtime._image_encoder.tokens(pixels)
        out[f"attention_{p}"] = runtime.explain(image, "a dog").attention
        out[f"scores_{p}"] = [x.score for x in sorted(answer, key=lambda x: x.index)]
    np.savez(folder / "schema1.npz", **out)
    shutil.make_archive(str(bundle), "zip", bundle)
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import zipfile
from pathlib import Path

from edgeclip.bundle import Bundle
from tests.support.paths import VECTORS

EXPECTED = VECTORS / "schema1.npz"


@functools.cache
def schema1_bundle() -> Bundle:
    """Extract the bundle, once for each process."""
    folder = Path(tempfile.mkdtemp(prefix="edgeclip-schema1-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(VECTORS / "schema1.zip") as archive:
        archive.extractall(folder)
    return Bundle(folder)
