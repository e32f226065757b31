"""Manifests of schema 1 and 2: round trips, and documents that are not manifests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip import Bundle, BundleError
from edgeclip.manifest import (
    CLEANINGS,
    INTERPOLATIONS,
    PRECISIONS,
    PRIOR_GRADIENTS,
    RESIZES,
    ImageSpec,
    Manifest,
    PriorSpec,
    Robustness,
    TextSpec,
    TokenSpec,
    Variant,
)
from edgeclip.purify import CosPurifier, DiffPurifier
from tests.support.paths import GARMENTS

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)

texts = st.text(max_size=8)
numbers = st.floats(-1e9, 1e9)
positive = st.floats(1e-9, 1e9)
sizes = st.integers(1, 8192)
counts = st.integers(0, 1 << 40)
names = st.from_regex(r"[a-z0-9_]{1,8}\.[a-z]{1,4}", fullmatch=True)
parities = st.dictionaries(texts, numbers, max_size=2)
templates = st.lists(st.sampled_from(["{}", "a {}.", "für {}: 日本"]), min_size=1).map(tuple)
images = st.builds(
    ImageSpec,
    size=st.tuples(sizes, sizes),
    mean=st.tuples(numbers, numbers, numbers),
    std=st.tuples(positive, positive, positive),
    resize=st.sampled_from(RESIZES),
    interpolation=st.sampled_from(INTERPOLATIONS),
    fill=st.integers(0, 255),
)
text_specs = st.builds(
    TextSpec,
    context_length=st.integers(3, 1 << 20),
    clean=st.sampled_from(CLEANINGS),
    dynamic_length=st.booleans(),
    pad_id=st.integers(0, 1 << 31),
)
priors = st.builds(
    PriorSpec,
    file=names,
    weights_sha256=texts,
    timesteps=st.integers(1000, 1 << 20),
    gradient=st.sampled_from(PRIOR_GRADIENTS),
    parity=parities,
)
rows = st.builds(
    Robustness,
    data=texts, samples=counts, norm=texts, eps=numbers, attacks=st.lists(texts).map(tuple),
    steps=counts, restarts=counts, seed=counts, purification=texts, clean_accuracy=numbers,
    worst_case_accuracy=numbers,
)  # fmt: skip
cos = st.builds(CosPurifier, st.integers(0, 10_000), st.floats(0, 1e9))
diff = st.builds(DiffPurifier, st.integers(0, 10_000), st.floats(0, 1e9), seed=st.integers(0, 99))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    tokens = draw(st.none() | st.builds(TokenSpec, st.tuples(sizes, sizes), st.integers(0, 9)))
    prior = draw(st.none() | priors)
    variants = st.builds(
        Variant,
        image_encoder=names,
        text_encoder=names,
        image_tokens=st.none() if tokens is None else names,
        parity=parities,
        cpu_ms=st.none() | positive,
    )
    return Manifest(
        description=draw(texts),
        source=draw(st.dictionaries(texts, texts, max_size=2)),
        embed_dim=draw(sizes),
        image=draw(images),
        text=draw(text_specs),
        tokens=tokens,
        logit_scale=draw(positive),
        logit_bias=draw(numbers),
        templates=draw(templates),
        null_templates=draw(templates),
        purification=draw(st.none() | cos if prior is None else st.none() | cos | diff),
        precisions=draw(st.dictionaries(st.sampled_from(sorted(PRECISIONS)), variants, min_size=1)),
        robustness=draw(st.lists(rows, max_size=2).map(tuple)),
        prior=prior,
        files=draw(st.dictionaries(names, texts, max_size=3)),
    )


@few
@given(manifests())
def test_a_manifest_survives_a_round_trip(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert json.loads(text)["schema_version"] == 2


documents: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=6,
)


def read(document: Any) -> Manifest | None:
    """Return the manifest, or None for a BundleError."""
    try:
        return Manifest.from_json(json.dumps(document))
    except BundleError:
        return None


@few
@given(documents)
def test_any_document_is_a_manifest_or_a_bundle_error(document: Any) -> None:
    assert read(document) is None
    for version in (1, 2):
        read({"schema_version": version, "entry": document})


def entries(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all entries of a JSON document."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [p for key in keys for p in [(*path, key), *entries(data[key], (*path, key))]]


VALID = json.loads((GARMENTS / "manifest.json").read_text())


@settings(few, max_examples=300)
@given(st.sampled_from(entries(VALID)), documents, st.sampled_from([1, 2]))
def test_any_value_of_an_entry_is_read_or_refused(
    path: tuple[Any, ...], value: Any, version: int
) -> None:
    data = json.loads(json.dumps(VALID | {"schema_version": version}))
    owner = data
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    read(data)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"schema_version": 2, "tokens": ' + "[" * 100_000,
        json.dumps(VALID).replace('"embed_dim": 128', f'"embed_dim": {"[" * 900}{"]" * 900}'),
        json.dumps(VALID).replace('"logit_bias": 0.0', '"logit_bias": 1' + "0" * 400),
        json.dumps(VALID).replace('"logit_bias": 0.0', '"logit_bias": 1' + "0" * 5000),
    ],
)
def test_extreme_documents_are_bundle_errors(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


def test_schema_1_names_the_image_encoder_for_its_tokens() -> None:
    old = json.loads(json.dumps(VALID | {"schema_version": 1}))
    for variant in old["precisions"].values():
        del variant["image_tokens"]
    manifest = Manifest.from_json(json.dumps(old))
    for variant in manifest.precisions.values():
        assert variant.image_tokens == variant.image_encoder
    assert Manifest.from_json(manifest.to_json()) == manifest
    without = Manifest.from_json(json.dumps(old | {"tokens": None}))
    assert [variant.image_tokens for variant in without.precisions.values()] == [None, None]


def test_every_precision_of_schema_2_needs_a_token_graph() -> None:
    data = json.loads(json.dumps(VALID))
    del data["precisions"]["int8"]["image_tokens"]
    with pytest.raises(BundleError, match="precision int8 must name its image_tokens, got None"):
        Manifest.from_json(json.dumps(data))


def test_the_embedded_manifest_is_of_schema_2() -> None:
    manifest = Bundle("garments").manifest
    assert manifest.schema_version == 2
    assert manifest.precisions["int8"].image_tokens == "image_tokens.int8.onnx"
