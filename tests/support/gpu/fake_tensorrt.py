"""A module with exactly the names of a TensorRT version, whose engines run in ONNX Runtime.

    trt = fake_tensorrt.module("tensorrt-10.3.0")

The names come from tests/support/gpu/tensorrt_surfaces. Other names raise AttributeError; names without a
behaviour in fake_tensorrt_builder.py or fake_tensorrt_engine.py raise NotImplementedError when called.
The builder checks its input as far as TensorRT does: a valid ONNX file, and a profile for each symbolic
size. An engine is JSON with the build's settings. Tests read and change `trt._fake`.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.gpu import fake_tensorrt_builder, fake_tensorrt_engine

SURFACES = Path(__file__).parent / "tensorrt_surfaces"
BEHAVIOURS: dict[str, type] = {
    behaviour.__name__: behaviour
    for behaviour in (*fake_tensorrt_builder.CLASSES, *fake_tensorrt_engine.CLASSES)
}


@dataclass
class Fake:
    """Settings of the module, and a record of its builds."""

    driver: bool = True
    refuses: str = ""  # error of every build
    warns: str = ""
    steps: int = 3  # steps of the longest phase of a build
    device: str = "GPU"  # device of the timing caches that it accepts
    builds: list[dict[str, Any]] = field(default_factory=list)  # content of the engines
    cancelled: bool = False  # the last build
    queue: Callable[[int, Callable[[], None]], None] = lambda _, work: work()  # (stream, work)


def surfaces() -> list[str]:
    return sorted(path.stem for path in SURFACES.glob("*.json"))


def module(name: str) -> ModuleType:
    """Return a new module with the names of a surface."""
    surface = json.loads((SURFACES / f"{name}.json").read_text())
    trt = ModuleType(surface["module"])
    trt.__spec__ = ModuleSpec(trt.__name__, None)  # PyTorch looks it up
    trt.__version__ = surface["version"]
    trt._fake = Fake()
    for attribute in surface["names"]:
        setattr(trt, attribute, None)
    enums = {
        key: enum.IntEnum(key.split(".")[-1], members) for key, members in surface["enums"].items()
    }
    for key, members in enums.items():
        if "." not in key:
            setattr(trt, key, members)
    for key, members in surface["classes"].items():
        setattr(trt, key, _restricted(trt, key, members))
    for owner in (trt.ILogger, trt.Logger):
        owner.Severity = enums["ILogger.Severity"]
        for member in owner.Severity:
            setattr(owner, member.name, member)
    return trt


def _restricted(trt: ModuleType, name: str, members: Sequence[str]) -> type:
    """Return a class with these members only, and the behaviour of BEHAVIOURS if there is one."""
    behaviour = BEHAVIOURS.get(name, object)
    space: dict[str, Any] = {member: _missing(name, member) for member in members}
    for key, value in vars(behaviour).items():
        if key in members or key.startswith("_"):
            space[key] = value
    space |= {"_trt": trt, "_known": frozenset(members), "__setattr__": _set}
    for key in ("__dict__", "__weakref__"):
        space.pop(key, None)
    return type(name, (), space)


def _missing(owner: str, name: str) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise NotImplementedError(f"tests/support/gpu/fake_tensorrt.py: {owner}.{name}")

    return call


def _set(self: Any, name: str, value: object) -> None:
    """Set an attribute as an extension class does: known names only, except in Python subclasses."""
    is_extension_class = "_known" in vars(type(self))
    if is_extension_class and not name.startswith("_") and name not in self._known:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    object.__setattr__(self, name, value)
