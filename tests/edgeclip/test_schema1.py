"""A bundle of schema 1 gives the answers that it gave when schema 1 was current."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgeclip import Runtime
from edgeclip.tools import golden
from export.to_tensorrt import graph_files
from tests.support.models.schema1 import EXPECTED, schema1_bundle


@pytest.fixture(scope="module")
def expected() -> dict[str, NDArray[np.float32]]:
    with np.load(EXPECTED) as arrays:
        return dict(arrays)


def test_its_image_encoder_has_both_outputs() -> None:
    bundle = schema1_bundle()
    assert json.loads((bundle.path / "manifest.json").read_text())["schema_version"] == 1
    bundle.verify()
    for precision in ("fp32", "int8"):
        path = bundle.encoder("image_encoder", precision)
        assert bundle.encoder("image_tokens", precision) == path
        assert [x.name for x in onnx.load(path).graph.output] == ["embedding", "tokens"]
    assert list(graph_files(bundle, ["fp32"])) == ["image_encoder.fp32", "text_encoder.fp32"]


# int8 rounds activations, which differ in their last bits from one processor to another.
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("int8", 0.02)])
def test_its_answers_are_the_same(
    expected: dict[str, NDArray[np.float32]], precision: str, limit: float
) -> None:
    runtime = Runtime(schema1_bundle(), device="cpu", precision=precision)
    image = expected["image"]
    pixels = runtime.preprocess([image])
    found = {
        "embedding": runtime._image_encoder.embed(pixels),
        "tokens": runtime._host.tokens(pixels),
        "attention": runtime.explain(image, "a dog").attention,
    }
    answer = runtime.classify(image, ["a dog", "a cat", "a car"])
    found["scores"] = np.array([x.score for x in sorted(answer, key=lambda x: x.index)])
    for name, values in found.items():
        scale = np.abs(expected[f"{name}_{precision}"]).max()
        np.testing.assert_allclose(
            values, expected[f"{name}_{precision}"], rtol=0, atol=limit * scale, err_msg=name
        )
    golden.check(runtime)
