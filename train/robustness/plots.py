"""Pictures of accuracy under attack: against eps, and against clean accuracy."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from edgeclip import storage
from train.errors import SettingsError
from train.robustness.defence import GRADIENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

    from train.robustness.result_file import Result

# Okabe and Ito's colours, which colour-blind readers tell apart. One more marker than colours: a
# pair of them comes back after 42 models only.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP*"
WIDTH = 75  # letters in a line of a legend
LABELS = 12  # settings named in a picture, at most
# Of a label from its point, the nearest first.
OFFSETS = [(x * side, y) for x in (9, 24) for y in (0, 9, -9, 24, -24, 40, -40) for side in (1, -1)]


def draw(measured: Sequence[Result], folder: Path) -> dict[Path, str]:
    """Draw what there is data for: files, and what each shows. Raises SettingsError for a file."""
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder} is a file: --plots names a folder")
    threats: dict[tuple[Any, ...], list[Result]] = {}
    models: dict[tuple[Any, ...], list[Result]] = {}
    for row in measured:
        place = tuple(row.settings[name] for name in ("data", "norm", "seed"))
        threats.setdefault((*place, row.settings["eps"]), []).append(row)
        models.setdefault((*place, row.model, row.purification), []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for rows in threats.values():
        if len(rows) > 1:
            path = folder / f"frontier-{_slug(rows[0], rows[0].size.replace(' eps', ''))}.png"
            drawn[path] = _frontier(rows, path)
    for rows in models.values():
        if len({row.settings["eps"] for row in rows}) > 1:
            name = f"{rows[0].settings['norm']} {rows[0].model} {rows[0].purification}"
            path = folder / f"eps-{_slug(rows[0], name)}.png"
            drawn[path] = _by_eps(rows, path)
    return drawn


def links(drawn: dict[Path, str], document: Path) -> list[str]:
    """The plots, as Markdown in the document."""
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
    """Accuracy at each eps: clean, under each gradient, and the worst case."""
    lowest: dict[float, Result] = {}
    for row in rows:  # of several results at one eps the worst counts
        eps = row.settings["eps"]
        if eps not in lowest or row.worst.mean() < lowest[eps].worst.mean():
            lowest[eps] = row
    found = [lowest[eps] for eps in sorted(lowest)]
    linf = found[0].settings["norm"] == "linf"
    sizes = [row.settings["eps"] * (255 if linf else 1) for row in found]
    figure, axes = _figure()
    axes.plot(sizes, [100 * row.clean.mean() for row in found], "k:", label="clean", zorder=3)
    for mode, colour, marker in zip(GRADIENTS, COLOURS, MARKERS, strict=False):
        marks = [row.modes.get(mode) for row in found]
        shares = [np.nan if mark is None else 100 * mark.mean() for mark in marks]
        if not np.isnan(shares).all():
            axes.plot(sizes, shares, color=colour, marker=marker, label=mode)
    worst = [100 * row.worst.mean() for row in found]
    axes.plot(sizes, worst, "k-", linewidth=4, alpha=0.35, zorder=1, label="worst case")
    settings = found[0].settings
    unit = "/255" if linf else ""
    axes.set(xlabel=f"{settings['norm']} eps{unit and ', in ' + unit}", ylabel="accuracy, %")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_ylim(-3, 103)
    axes.legend()
    text = f"{settings['data']}, {found[0].name}: accuracy by eps ({settings['norm']})"
    _save(figure, axes, text, found, path)
    return f"{text}, worst case {worst[0]:.1f} % at {sizes[0]:g}{unit}, {worst[-1]:.1f} % at " + (
        f"{sizes[-1]:g}{unit}"
    )


def _frontier(rows: Sequence[Result], path: Path) -> str:
    """Clean against worst-case accuracy: a colour for each model, hollow where it is purified."""
    figure, axes = _figure()
    models = list(dict.fromkeys(row.model for row in rows))
    for i, model in enumerate(models):
        own = [row for row in rows if row.model == model]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.scatter([], [], color=colour, marker=marker, label=model)
        for row in own:
            face = "none" if row.purifier else colour
            axes.scatter(*_point(row), marker=marker, edgecolors=colour, facecolors=face, s=45)
    axes.set(xlabel="worst-case accuracy under attack, %", ylabel="clean accuracy, %")
    axes.margins(0.2, 0.12)
    purified = [row for row in rows if row.purifier]
    figure.legend(
        loc="outside lower center",
        ncols=max(1, min(len(models), WIDTH // max(map(len, models)))),
        title="hollow: purified" if purified else None,
    )
    text = f"{rows[0].title}: clean against worst-case accuracy"
    _save(figure, axes, text, rows, path, labels=_extremes_first(purified))
    best = max(rows, key=lambda row: row.worst.mean())
    return f"{text}, the highest worst case {_point(best)[0]:.1f} % by {best.name}"


def _point(row: Result) -> tuple[float, float]:
    return 100 * row.worst.mean(), 100 * row.clean.mean()


def _extremes_first(rows: Sequence[Result]) -> dict[tuple[float, float], str]:
    """Point -> settings that lie there; first those that bound a model's settings."""
    names: dict[tuple[float, float], list[str]] = {}
    extremes = []
    for model in dict.fromkeys(row.model for row in rows):
        points = [_point(row) for row in rows if row.model == model]
        extremes += [f(points, key=lambda p: p[axis]) for f in (max, min) for axis in range(2)]
    for row in rows:
        names.setdefault(_point(row), []).append(row.purification)
    ordered = list(dict.fromkeys([*extremes, *names]))[:LABELS]
    more = {p: f" and {len(names[p]) - 1} more" if len(names[p]) > 1 else "" for p in ordered}
    return {point: names[point][0] + more[point] for point in ordered}


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(
    figure: Figure,
    axes: Axes,
    title: str,
    rows: Sequence[Result],
    path: Path,
    labels: dict[tuple[float, float], str] | None = None,
) -> None:
    doubted = sum(not row.believed for row in rows)
    if doubted:
        title += f"\n{doubted} of {len(rows)} results have not passed all checks"
    axes.set_title(title, fontsize=10)
    figure.draw_without_rendering()  # which settles where points lie
    _label(axes, labels or {})
    with storage.writing(path) as file:
        figure.savefig(file, format="png")


def _label(axes: Axes, labels: dict[tuple[float, float], str]) -> None:
    """Name points where there is room: a label that would cover a point or a label is left out."""
    points = [axes.transData.transform(p) for c in axes.collections for p in c.get_offsets()]
    renderer = axes.figure.canvas.get_renderer()
    taken: list[Bbox] = []
    for point, text in labels.items():
        for offset in OFFSETS:
            label = axes.annotate(
                text, point, textcoords="offset points", xytext=offset, fontsize=8, va="center",
                ha="left" if offset[0] > 0 else "right", in_layout=False,
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": "0.5", "shrinkA": 0},
            )  # fmt: skip
            label.update_positions(renderer)
            box = Text.get_window_extent(label).padded(6)  # without the line to the point
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not box.count_overlaps(taken) and not box.count_contains(points):
                taken.append(box)
                break
            label.remove()
