"""The forms of charts that pages use, made by Altair."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import altair

from sparsejax.report.section import Spec

alt: Any = altair  # whose own types know no names that are computed

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
"""Okabe and Ito's colours, which the colour-blind tell apart; runs differ in their dashes, too."""
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [10, 4], [1, 3], [6, 2, 2, 2])
HEIGHT, POINTS = 220, 400


def lines(
    data: str,
    x: str,
    y: str,
    runs: Sequence[str],
    *,
    title: str,
    x_title: str,
    y_title: str,
    dashed: Optional[str] = None,
    log_x: bool = False,
    zero: bool = False,
) -> Spec:
    """`y` over `x`, a line for each of `runs` (column `run`); `dashed` is the column that dashes tell apart instead of
    the runs'."""
    color = alt.Color("run:N", title=None, scale=_palette(runs), legend=_legend(len(runs) > 1))
    names = [dashed] if dashed else ["run"]
    # Vega draws no symbols in a legend of dashes alone: titles say what they mean, and the note at a point does.
    dash = alt.StrokeDash(f"{dashed}:N", title=None, legend=None) if dashed else _dash(runs)
    scale = alt.Scale(type="log", nice=False) if log_x else alt.Scale(nice=False)
    chart = _chart(data, title).mark_line(point={"size": 18}, interpolate="linear", strokeWidth=2)
    return _spec(
        chart.encode(
            x=alt.X(f"{x}:Q", title=x_title, scale=scale, axis=alt.Axis(format="~s", labelOverlap=True, tickCount=6)),
            y=alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=zero)),
            color=color,
            strokeDash=dash,
            tooltip=[
                "run:N",
                *(f"{name}:N" for name in names if name != "run"),
                alt.Tooltip(f"{x}:Q", title=x_title, format=",.4~g"),
                alt.Tooltip(f"{y}:Q", title=y_title, format=".4~f"),
            ],
        )
    )


def heat_map(
    data: str,
    x: str,
    y: str,
    value: str,
    *,
    title: str,
    legend: str,
    domain: Optional[Sequence[float]] = None,
    slider: Optional[Sequence[int]] = None,
    x_title: Optional[str] = None,
    y_title: Optional[str] = None,
    form: str = ".2f",
) -> Spec:
    """Cells coloured by viridis, whose lightness alone orders them. `slider` are the steps that the data set has, its
    column `frame` being the place of each."""
    chart = _chart(data, title)
    if slider is not None:
        # A slider over frames, not steps: steps need not be evenly spaced.
        last = len(slider) - 1
        frame = alt.param(name="frame", value=last, bind=alt.binding_range(min=0, max=last, step=1, name="time "))
        chart = chart.add_params(frame).transform_filter("datum.frame === frame")
        told = f"{json.dumps(title)} + ', step ' + {json.dumps(list(slider))}[frame]"
        chart = chart.properties(title=alt.TitleParams(text=alt.ExprRef(told)))
    return _spec(
        chart.mark_rect().encode(
            x=alt.X(f"{x}:O", title=x_title or x, sort=None, axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(f"{y}:O", title=y_title, sort=None, axis=alt.Axis(labelLimit=140)),
            color=alt.Color(
                f"{value}:Q",
                title=legend,
                scale=alt.Scale(scheme="viridis", clamp=True, **({"domain": list(domain)} if domain else {})),
                legend=alt.Legend(orient="bottom", direction="horizontal", gradientLength=160),
            ),
            tooltip=[
                f"{y}:O",
                f"{x}:O",
                *(["step:Q"] if slider is not None else []),
                alt.Tooltip(f"{value}:Q", title=legend, format=form),
            ],
        ),
        height={"step": 22} if y != "expert" else HEIGHT,
    )


def bars(
    data: str, x: str, y: str, runs: Sequence[str], *, title: str, x_title: str, y_title: str, sort: Any = None
) -> Spec:
    """Bars side by side, one for each run; a pale outline tells neighbours apart in print."""
    offset = {"xOffset": alt.XOffset("run:N", sort=list(runs))} if len(runs) > 1 else {}
    chart = _chart(data, title).mark_bar(stroke="#888", strokeWidth=0.5)
    return _spec(
        chart.encode(
            x=alt.X(f"{x}:O", title=x_title, sort=sort, axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y(f"{y}:Q", title=y_title),
            color=alt.Color("run:N", title=None, scale=_palette(runs), legend=_boxes(len(runs) > 1)),
            tooltip=["run:N", f"{x}:O", alt.Tooltip(f"{y}:Q", title=y_title, format=",.4~f")],
            **offset,
        )
    )


def stacked(data: str, x: str, y: str, part: str, *, title: str, x_title: str, y_title: str) -> Spec:
    """Bars in parts, a facet row for each run."""
    chart = _chart(data, title).mark_bar(stroke="#888", strokeWidth=0.5)
    return _spec(
        chart.encode(
            x=alt.X(f"{x}:O", title=x_title, sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            xOffset=alt.XOffset("run:N", sort=None),
            y=alt.Y(f"{y}:Q", title=y_title),
            color=alt.Color(
                f"{part}:N", title=None, scale=alt.Scale(range=list(OKABE_ITO)), legend=alt.Legend(orient="top")
            ),
            tooltip=["run:N", f"{x}:O", f"{part}:N", alt.Tooltip(f"{y}:Q", title=y_title, format=".4~f")],
        )
    )


def marks(data: str, x: str, y: str, *, title: str, steps: Sequence[int]) -> Spec:
    """A tick wherever a row is: time lines, one for each value of `y`."""
    scale = alt.Scale(domain=[min(steps), max(max(steps), min(steps) + 1)], nice=False)
    chart = _chart(data, title).mark_tick(thickness=3, height=14, color=OKABE_ITO[5])
    return _spec(
        chart.encode(
            x=alt.X(f"{x}:Q", title=x, scale=scale, axis=alt.Axis(format="~s")),
            y=alt.Y(f"{y}:O", title=None, sort=None),
            tooltip=[f"{y}:O", f"{x}:Q"],
        ),
        height={"step": 20},
    )


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as a data set by columns, numbers to five digits: no screen shows more."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [short(row.get(key)) for row in rows] for key in keys}


def short(value: Any) -> Any:
    """A float to five digits, everything else as it is."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.5g}")
    if rounded != rounded or abs(rounded) == float("inf"):  # JSON has neither
        return None
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def _chart(data: str, title: str) -> Any:
    return alt.Chart(alt.NamedData(data), title=title)


def _spec(chart: Any, height: Any = HEIGHT) -> Spec:
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec = chart.properties(width="container", height=height, autosize=fit).to_dict()
    return {key: value for key, value in spec.items() if key not in ("config", "$schema")}


def _palette(runs: Sequence[str]) -> Any:
    return alt.Scale(domain=list(runs), range=_cycled(OKABE_ITO, len(runs)))


def _dash(runs: Sequence[str]) -> Any:
    legend = _legend(len(runs) > 1)
    return alt.StrokeDash(
        "run:N", title=None, scale=alt.Scale(domain=list(runs), range=_cycled(DASHES, len(runs))), legend=legend
    )


@functools.cache
def _legend(shown: bool) -> Any:
    if not shown:
        return None
    return alt.Legend(orient="top", labelLimit=260, symbolType="stroke", symbolSize=300)


def _boxes(shown: bool) -> Any:
    return alt.Legend(orient="top", labelLimit=260) if shown else None


def _cycled(values: Sequence[Any], count: int) -> list[Any]:
    return [values[place % len(values)] for place in range(count)]
