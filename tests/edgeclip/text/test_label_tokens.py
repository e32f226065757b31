"""Labels with equal tokens, and labels that are cut off, compared with open_clip's tokens."""

from __future__ import annotations

import logging
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from edgeclip import Label, LabelError
from edgeclip.text.label_tokens import Cut, LabelTokens, check_tokens, read_tokens
from edgeclip.text.tokenizer import Tokenizer
from tests.support.models.export_models import write_sentencepiece_like
from tests.support.texts import random_text, runtime

LENGTH = 10
KINDS = ("clip", "canonicalize", "whitespace", "siglip-like")
CHANGES: tuple[Callable[[str], str], ...] = (
    str.upper,
    str.title,
    lambda text: unicodedata.normalize("NFC", text),
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: text.replace(" ", "  "),
    lambda text: text.replace("-", ""),
    lambda text: text.replace("-", " "),
    lambda text: f"{text} s",
    lambda text: f"{text}!",
    lambda text: text[:-1],
)


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Tokenizer]:
    """Return open_clip's tokenizer, and edgeclip's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "siglip-like":
        write_sentencepiece_like(folder)
        theirs: Any = HFTokenizer(str(folder), context_length=LENGTH, clean="canonicalize")
    else:
        clean = "lower" if request.param == "clip" else request.param
        theirs = SimpleTokenizer(context_length=LENGTH, clean=clean)
    return theirs, runtime(theirs, folder)


def random_label(rng: random.Random) -> str:
    words = ("cat", "dog", "café", "T-shirt", "ankle", "Ångström", "ﬁne", "x&amp;y", "日本", "!")
    text = " ".join(rng.choices(words, k=rng.choice((1, 1, 2, 3, 8))))
    awkward = re.sub("_of_text>", "", random_text(rng), flags=re.IGNORECASE).strip()
    return awkward if awkward and rng.random() < 0.2 else text


def check_distinct(
    tokenizer: Tokenizer, labels: Sequence[Label], templates: Sequence[str], length: int = LENGTH
) -> list[LabelTokens]:
    tokens = [read_tokens(tokenizer, label, templates) for label in labels]
    check_tokens(labels, tokens, templates, length)
    return tokens


def test_labels_are_refused_exactly_if_open_clips_ids_are_equal(
    pair: tuple[Any, Tokenizer],
) -> None:
    theirs, ours = pair
    rng = random.Random(0)
    equal_count = 0
    for _ in range(400):
        name = random_label(rng)
        other = rng.choice(CHANGES)(name).strip() or "y"
        templates = rng.choice((["{}"], ["a {}.", "my {} here"], ["{}", "one two three four {}"]))
        labels = [Label(name), Label(other)]
        ids = [sorted(theirs(label.worded(templates)).tolist()) for label in labels]
        equal_count += ids[0] == ids[1]
        if ids[0] == ids[1]:
            with pytest.raises(LabelError, match="cannot be told apart"):
                check_distinct(ours, labels, templates)
        else:
            check_distinct(ours, labels, templates)
    assert 25 < equal_count < 385


def test_labels_are_cut_exactly_if_open_clip_cuts(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    rng = random.Random(1)
    kinds = []
    for _ in range(200):
        name = random_label(rng)
        before = " ".join(rng.choices(("cat", "big", "dog"), k=rng.randrange(10)))
        (whole,) = theirs([f"{before} {name}"], context_length=500).tolist()
        (read,) = theirs([f"{before} {name}"]).tolist()
        one = read_tokens(ours, Label(name), [f"{before} {{}}"])
        kinds.append(one.cut)
        assert (one.cut != Cut.NOTHING) == (read != whole[:LENGTH])
        # If a name is cut off, any name gives the same ids. SigLIP's first token may be a space.
        same = [theirs([f"{before} {other}"]).tolist() == [read] for other in ("zebra", "7")]
        assert all(same) or one.cut != Cut.NAME
        assert not all(same) or one.cut == Cut.NAME or isinstance(theirs, HFTokenizer)
    assert {kinds.count(kind) > 10 for kind in Cut} == {True}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return runtime(SimpleTokenizer(context_length=LENGTH), tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    ("a", "b", "templates", "reason"),
    [
        ("Trousers", "trousers", ["a {}."], "they differ only in upper and lower case"),
        ("caf\u00e9", "cafe\u0301", ["a {}."], "they differ only in Unicode form"),
        ("\uff23AT", "CAT", ["a {}."], "they differ only in Unicode form"),
        ("a  b", "a b", ["{}"], "they differ only in white space"),
        ("a\tb", "a b", ["{}"], "they differ only in white space"),
        ("x " * 9 + "y", "x " * 9 + "z", ["{}"], "10 tokens, and they differ only after these"),
        ("cat", "dog", ["a " * 9 + "{}"], "10 tokens, and they differ only after these"),
        (Label("cat", ("dog",)), "dog", ["{}"], "their prompts are the same"),
        (Label("cat", ("x", "y")), Label("dog", ("y", "x")), ["{}"], "prompts are the same"),
        (Label("cat", ("x", "x")), "x", ["{}"], ""),
        ("cat &amp; dog", "cat & dog", ["{}"], ""),
    ],
)
def test_the_error_names_both_and_the_reason(
    clip: Tokenizer, a: str | Label, b: str | Label, templates: list[str], reason: str
) -> None:
    labels = [x if isinstance(x, Label) else Label(x) for x in ("other", a, "more", b)]
    with pytest.raises(LabelError) as caught:
        check_distinct(clip, labels, templates)
    message = str(caught.value)
    assert "\n" not in message
    if max(len(labels[1].name), len(labels[3].name)) < 20 and "after" not in reason:
        assert message.startswith(f"labels {labels[1].name!r} and {labels[3].name!r} cannot be")
    assert "the model reads both as the same tokens" in message
    assert reason in message
    assert ("since" in message) == bool(reason)


def test_punctuation_that_siglips_cleaning_drops(tmp_path: Path) -> None:
    ours = runtime(SimpleTokenizer(context_length=LENGTH, clean="canonicalize"), tmp_path)
    with pytest.raises(
        LabelError, match=r"'a-b' and 'ab' .* since they differ only in punctuation"
    ):
        check_distinct(ours, [Label("a-b"), Label("ab")], ["a {}."])


def test_prompts_may_share_tokens_in_part(clip: Tokenizer) -> None:
    check_distinct(clip, [Label("cat"), Label("dog", ("cat", "dog"))], ["{}"])
    check_distinct(clip, [Label("a", ("x", "x", "y")), Label("b", ("x", "y", "y"))], ["{}"])
    with pytest.raises(LabelError, match="cannot be told apart"):
        check_distinct(clip, [Label("a", ("X", "x", "y", "Y")), Label("b", ("y", "x"))], ["{}"])


def test_one_warning_names_the_cut_labels(
    clip: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings_of(labels: Sequence[str | Label], *templates: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            checked = [x if isinstance(x, Label) else Label(x) for x in labels]
            check_distinct(clip, checked, templates)
        return caplog.messages

    assert warnings_of(["cat", "dog"], "one two three four five six seven {}", "{}") == []
    end = "a prompt is longer than the 10 tokens that the model reads, and"
    long = "x " * 40
    assert warnings_of(["cat", f"y {long}"], "{}") == [
        f"label {('y ' + long)[:60] + '...'!r}: {end} its end is cut off"
    ]
    assert warnings_of([f"{i} {'x ' * 9}" for i in "abcde"], "{}") == [
        f"labels 'a {'x ' * 9}', 'b {'x ' * 9}', 'c {'x ' * 9}' and 2 more: {end} its end is cut off"
    ]
    name_cut = f"{end} the label itself is cut off: shorten the template"
    assert warnings_of(["cat", "dog"], "{}", "a " * 8 + "{}") == [
        f"labels 'cat', 'dog': {name_cut}"
    ]
    assert warnings_of(["cat"], "a " * 8 + "{}") == [f"label 'cat': {name_cut}"]
    assert warnings_of(["cat"], "a " * 7 + "{} b") == [f"label 'cat': {end} its end is cut off"]
    prompted = Label("x", ("a " * 9,)), Label("y", ("a " * 8 + "{}", "{}"))
    assert warnings_of(prompted, "{}") == [
        f"label 'x': {end} its end is cut off",
        f"label 'y': {name_cut}",
    ]
    assert re.search(r"\n", "".join(caplog.messages)) is None
