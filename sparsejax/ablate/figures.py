"""Figures of result pages."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.ablate.page import Results, by_metric, values_of

MET, MISSED = "#0072B2", "#D55E00"
"""Runs, and their mean (Okabe and Ito's blue and vermilion)."""


@contextlib.contextmanager
def drawing(path: Path, **layout: Any) -> Iterator[Any]:
    """The panels of a figure, saved afterwards: on no background, in a grey that is read on white and on black."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    look: dict[Any, Any] = {**dict.fromkeys(grey, "#808080"), "legend.framealpha": 0, "svg.hashsalt": path.stem}
    with pyplot.rc_context(look):
        figure, panels = pyplot.subplots(layout="constrained", **layout)
        yield panels
        figure.savefig(path, metadata={"Date": None}, transparent=True)
        pyplot.close(figure)


def draw(path: Path, results: Results) -> None:
    """The figure of a study's page."""
    if results["scatter"] is None:
        _draw_arms(path, results)
    else:
        _draw_scatter(path, results, *results["scatter"])


def _draw_scatter(path: Path, results: Results, across: str, up: str) -> None:
    """Arms and variants at the means of two figures, with a dot a run. Families share the first word of their names, a
    colour and a line."""
    points: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for name, arm in {**results["arms"], **results["variants"]}.items():
        values = values_of(arm, across), values_of(arm, up)
        if all(each.size for each in values):
            points.setdefault(name.replace("_", " ").split()[0], []).append((name, *values))
    with drawing(path, figsize=(9, 5)) as panel:
        for number, found in enumerate(points.values()):
            found.sort(key=lambda each: each[1].mean())
            colour = f"C{number}"
            panel.plot([x.mean() for _, x, _ in found], [y.mean() for _, _, y in found], color=colour, alpha=0.4)
            for name, x, y in found:
                panel.plot(np.full(y.size, x.mean()), y, "o", color=colour, alpha=0.6, markersize=4)
                label = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 7, "color": colour}
                panel.annotate(name, (x.mean(), y.mean()), **label)
        panel.set_xlabel(across.replace("_", " "))
        panel.set_ylabel(up.replace("_", " "))
        panel.grid(alpha=0.3)


def _draw_arms(path: Path, results: Results) -> None:
    """An arm a line: a dot a run, the mean a stroke, the interval of its difference from the base laid at the base's
    mean. The best above."""
    arms, metric = by_metric(results)[::-1], results["metric"]
    middle = {name: values_of(results["arms"][name], metric).mean() for name in arms}
    with drawing(path, figsize=(8, 0.32 * len(arms) + 1)) as panel:
        for place, name in enumerate(arms):
            values = values_of(results["arms"][name], metric)
            panel.plot(values, [place] * len(values), "o", color=MET, alpha=0.6, markersize=4)
            panel.plot([middle[name]] * 2, [place - 0.3, place + 0.3], color=MISSED)
            verdict = results["verdicts"].get(name)
            if verdict is not None and verdict["low"] is not None:
                ends = middle[results["base"]] + np.array([verdict["low"], verdict["high"]])
                panel.plot(ends, [place] * 2, color="#808080", linewidth=1)
        if results["base"] in middle:
            panel.axvline(middle[results["base"]], color="#808080", linewidth=1, linestyle=":")
        panel.set_xlabel(f"{metric.replace('_', ' ')}; grey: 95 % interval of the difference from {results['base']}")
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(arms)), arms)
