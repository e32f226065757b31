"""Plots of accuracy under attack: against eps, and against clean accuracy."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from edgeclip import storage
from train.errors import SettingsError
from train.robustness.result_file import GRADIENTS, Result

# Okabe and Ito's colours, which colour-blind readers can distinguish. With one more marker than
# colours, a combination repeats only after 42 models.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*"
LEGEND_WIDTH = 75  # characters in a line
MAX_LABELS = 12
# From a point to its label, nearest first.
OFFSETS = [(x * side, y) for x in (9, 24) for y in (0, 9, -9, 24, -24, 40, -40) for side in (1, -1)]


def draw(results: Sequence[Result], folder: Path) -> dict[Path, str]:
    """Draw every plot that the results have data for, and return the files with their descriptions.

    Raises SettingsError where `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder} is a file: --plots names a folder")
    threats: dict[tuple[Any, ...], list[Result]] = {}
    models: dict[tuple[Any, ...], list[Result]] = {}
    for row in results:
        shared = tuple(row.settings[name] for name in ("data", "norm", "seed"))
        threats.setdefault((*shared, row.settings["eps"]), []).append(row)
        models.setdefault((*shared, row.model, row.purification), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for rows in threats.values():
        if len(rows) > 1:
            path = folder / f"frontier-{_slug(rows[0], rows[0].radius.replace(' eps', ''))}.png"
            drawn[path] = _frontier(rows, path)
    for rows in models.values():
        if len({row.settings["eps"] for row in rows}) > 1:
            name = f"{rows[0].settings['norm']} {rows[0].model} {rows[0].purification}"
            path = folder / f"eps-{_slug(rows[0], name)}.png"
            drawn[path] = _by_eps(rows, path)
    return drawn


def links(drawn: dict[Path, str], document: Path) -> list[str]:
    """Return the plots as Markdown images for a document."""
    folder = document.resolve().parent
    return [
        f"![{text}]({quote(Path(os.path.relpath(path.resolve(), folder)).as_posix())})"
        for path, text in drawn.items()
    ]


def _slug(row: Result, name: str) -> str:
    seed = f" seed {row.settings['seed']}" if row.settings["seed"] else ""
    text = f"{row.settings['data']} {name}{seed}".lower()
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.")


def _by_eps(rows: Sequence[Result], path: Path) -> str:
    """Plot accuracy at each eps: clean, under each gradient, and the worst case."""
    lowest: dict[float, Result] = {}
    for row in rows:  # the lowest of several results at one eps counts
        eps = row.settings["eps"]
        if eps not in lowest or row.worst.mean() < lowest[eps].worst.mean():
            lowest[eps] = row
    ordered = [lowest[eps] for eps in sorted(lowest)]
    linf = ordered[0].settings["norm"] == "linf"
    sizes = [row.settings["eps"] * (255 if linf else 1) for row in ordered]
    canvas, axes = _canvas()
    axes.plot(sizes, [100 * row.clean.mean() for row in ordered], "k:", label="clean", zorder=3)
    for mode, colour, marker in zip(GRADIENTS, COLOURS, MARKERS, strict=False):
        marks = [row.by_gradient.get(mode) for row in ordered]
        shares = [np.nan if mark is None else 100 * mark.mean() for mark in marks]
        if not np.isnan(shares).all():
            axes.plot(sizes, shares, color=colour, marker=marker, label=mode)
    worst = [100 * row.worst.mean() for row in ordered]
    axes.plot(sizes, worst, "k-", linewidth=4, alpha=0.35, zorder=1, label="worst case")
    settings = ordered[0].settings
    unit = "/255" if linf else ""
    axes.set(xlabel=f"{settings['norm']} eps{unit and ', in ' + unit}", ylabel="accuracy, %")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_ylim(-3, 103)
    axes.legend()
    text = f"{settings['data']}, {ordered[0].name}: accuracy by eps ({settings['norm']})"
    _save(canvas, axes, text, ordered, path)
    return f"{text}, worst case {worst[0]:.1f} % at {sizes[0]:g}{unit}, {worst[-1]:.1f} % at " + (
        f"{sizes[-1]:g}{unit}"
    )


def _frontier(rows: Sequence[Result], path: Path) -> str:
    """Plot clean against worst-case accuracy: a colour for each model, hollow where purified."""
    canvas, axes = _canvas()
    models = list(dict.fromkeys(row.model for row in rows))
    for i, model in enumerate(models):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.scatter([], [], color=colour, marker=marker, label=model)
        for row in (row for row in rows if row.model == model):
            face = "none" if row.purifier else colour
            axes.scatter(*_point(row), marker=marker, edgecolors=colour, facecolors=face, s=45)
    axes.set(xlabel="worst-case accuracy under attack, %", ylabel="clean accuracy, %")
    axes.margins(0.2, 0.12)
    purified = [row for row in rows if row.purifier]
    canvas.figure.legend(
        loc="outside lower center",
        ncols=max(1, min(len(models), LEGEND_WIDTH // max(map(len, models)))),
        title="hollow: purified" if purified else None,
    )
    text = f"{rows[0].title}: clean against worst-case accuracy"
    _save(canvas, axes, text, rows, path, labels=_extremes_first(purified))
    best = max(rows, key=lambda row: row.worst.mean())
    return f"{text}, the highest worst case {_point(best)[0]:.1f} % by {best.name}"


def _point(row: Result) -> tuple[float, float]:
    return 100 * row.worst.mean(), 100 * row.clean.mean()


def _extremes_first(rows: Sequence[Result]) -> dict[tuple[float, float], str]:
    """Return labels by point, first those of the extreme points of each model."""
    names: dict[tuple[float, float], list[str]] = {}
    extremes = []
    for model in dict.fromkeys(row.model for row in rows):
        points = [_point(row) for row in rows if row.model == model]
        extremes += [f(points, key=lambda p: p[axis]) for f in (max, min) for axis in range(2)]
    for row in rows:
        names.setdefault(_point(row), []).append(row.purification)
    ordered = list(dict.fromkeys([*extremes, *names]))[:MAX_LABELS]
    more = {p: f" and {len(names[p]) - 1} more" if len(names[p]) > 1 else "" for p in ordered}
    return {point: names[point][0] + more[point] for point in ordered}


def _canvas() -> tuple[FigureCanvasAgg, Axes]:
    canvas = FigureCanvasAgg(Figure(figsize=(7, 5), dpi=150, layout="constrained"))
    axes = canvas.figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def _save(
    canvas: FigureCanvasAgg,
    axes: Axes,
    title: str,
    rows: Sequence[Result],
    path: Path,
    labels: dict[tuple[float, float], str] | None = None,
) -> None:
    untrusted = sum(not row.passed_checks for row in rows)
    if untrusted:
        title += f"\n{untrusted} of {len(rows)} results have not passed all checks"
    axes.set_title(title, fontsize=10)
    canvas.figure.draw_without_rendering()  # sets the final positions of the points
    _label(canvas, axes, labels or {})
    with storage.writing(path) as file:
        canvas.figure.savefig(file, format="png")


def _label(canvas: FigureCanvasAgg, axes: Axes, labels: dict[tuple[float, float], str]) -> None:
    """Label points where there is room, and omit labels that would cover a point or another label."""
    offsets = [np.asarray(collection.get_offsets()) for collection in axes.collections]
    points = [axes.transData.transform(point) for rows in offsets for point in rows]
    occupied: list[Bbox] = []
    for point, text in labels.items():
        for offset in OFFSETS:
            label = axes.annotate(
                text, point, textcoords="offset points", xytext=offset, fontsize=8, va="center",
                ha="left" if offset[0] > 0 else "right", in_layout=False,
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "0.5", "shrinkA": 0},
            )  # fmt: skip
            label.update_positions(canvas.get_renderer())  # type: ignore[no-untyped-call]
            box = Text.get_window_extent(label).padded(6)  # without the line to the point
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not box.count_overlaps(occupied) and not box.count_contains(points):
                occupied.append(box)
                break
            label.remove()
