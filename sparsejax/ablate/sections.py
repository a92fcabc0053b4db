"""What a study's `report.html` shows before its runs: verdicts, what was spent for what was reached, power, flags."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair

from sparsejax.ablate.page import (
    EQUAL,
    Results,
    by_metric,
    has_speed_up,
    interval,
    pareto,
    power_lines,
    seeds_cell,
    shown_figures,
    spread,
    standing,
    values_of,
    verdict_words,
    without_result,
)
from sparsejax.ablate.runner import Job
from sparsejax.ablate.statistics import BETTER, UNDECIDED, WORSE
from sparsejax.report.charts import columns
from sparsejax.report.page import write_page
from sparsejax.report.section import Section, Spec
from sparsejax.report.tables import table

alt: Any = altair  # whose own types know no names that are computed

MOST_RUNS = 8
"""Whose own charts the page has: what a reader tells apart, and a browser draws at once. The best, and the base."""
BLUE, RED = "#0072B2", "#D55E00"
SPENT = {"flops": "training FLOPs, ideal", "parameters": "parameters", "seconds": "seconds of a run"}
ON = [True, False]
"""Whether a point is on the Pareto front, in the order of its marks."""


def write_report(path: Path, results: Results, jobs: Sequence[Job]) -> None:
    """One page: the study's sections, then those of the first seed's runs."""
    best = [name for name in by_metric(results) if name != results["base"]][: MOST_RUNS - 1]
    first = {job.arm: job.workdir for job in jobs if job.seed == results["seeds"][0] and job.done}
    runs = [first[name] for name in (results["base"], *best) if name in first]
    write_page(path, runs, results["study"], study_sections(results))


def study_sections(results: Results) -> list[Section]:
    return [_verdict_section(results), _spent_section(results)]


def _verdict_section(results: Results) -> Section:
    metric, base, names = results["metric"], results["base"], by_metric(results)
    faster = has_speed_up(results)
    rows, dots = [], []
    for name in names:
        arm, verdict = results["arms"][name], results["verdicts"].get(name)
        values = values_of(arm, metric)
        cells = [f"<strong>{html.escape(name)}</strong>" if name == base else html.escape(name), spread(values)]
        if verdict is None:
            cells += [standing(results, name), "", "", "", *([""] if faster else [])]
        else:
            p = "" if verdict["adjusted_p"] is None else f"{verdict['adjusted_p']:.2g}"
            cells += [_marked(results, verdict), interval(verdict), p]
            cells += [seeds_cell(verdict), *([verdict["speed_up"] or ""] if faster else [])]
        for each in shown_figures(results):
            found = values_of(arm, each)
            cells.append(f"{found.mean():.3g}" if found.size else "")
        rows.append(cells)
        dots += [{"arm": name, "value": float(value)} for value in values]
    head = ["arm", html.escape(metric), "verdict", f"difference from {html.escape(base)}", "p", "seeds needed"]
    head += [*(["effective speed-up"] if faster else []), *map(html.escape, shown_figures(results))]
    notes = "".join(f"<p>{_with_code(note)}</p>" for note in results["notes"])
    equal = f"<p>Equal between arms: {EQUAL[results['equal']]}. <code>{html.escape(results['command'])}</code></p>"
    power = f"<p>{_with_code(' '.join(power_lines(results)))}</p>"
    flags = "".join(f"<p>Not equal between arms: {html.escape(flag)}.</p>" for flag in results["flags"])
    failed = "".join(
        f'<div class="alert"><strong>{html.escape(name)}, seed {seed}</strong>: {html.escape(why)}</div>'
        for name, seed, why in without_result(results)
    )
    chart = alt.Chart(alt.NamedData("study"), title=f"{metric}: runs, and their mean").encode(
        y=alt.Y("arm:N", sort=names, title=None, axis=alt.Axis(labelLimit=200))
    )
    value = alt.X("value:Q", title=metric, scale=alt.Scale(zero=False))
    points = chart.mark_circle(color=BLUE, size=60, opacity=0.7).encode(x=value, tooltip=["arm:N", "value:Q"])
    means = chart.mark_tick(color=RED, thickness=3).encode(x=alt.X("mean(value):Q", title=metric))
    spec = _spec(alt.layer(points, means), {"step": 22})
    text = notes + equal + table(head, rows, 3) + power + flags + failed
    return Section("Verdicts", text, [spec], {"study": columns(dots)})


def _with_code(note: str) -> str:
    """A note, which is Markdown, with its names as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(note))


def _marked(results: Results, verdict: Mapping[str, Any]) -> str:
    """A verdict that is not told by colour alone."""
    return f"{ {BETTER: '▲', WORSE: '▼', UNDECIDED: '·'}[verdict['verdict']] } {verdict_words(results, verdict)}"


def _spent_section(results: Results) -> Section:
    """The metric against what each arm spent; those that nothing beats in both are the Pareto front."""
    metric = results["metric"]
    specs: list[Spec] = []
    data: dict[str, Any] = {}
    for key, title in SPENT.items():
        points = pareto(results, key).items()
        rows = [{"arm": name, key: cost, "value": value, "front": best} for name, (cost, value, best) in points]
        data[f"front_{key}"] = columns(rows)
        chart = alt.Chart(alt.NamedData(f"front_{key}"), title=f"{metric} against {title}")
        dots = chart.mark_point(size=70, filled=True).encode(
            x=alt.X(f"{key}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False)),
            shape=alt.Shape("front:N", title="Pareto front", scale=alt.Scale(domain=ON, range=["diamond", "circle"])),
            color=alt.Color("front:N", title="Pareto front", scale=alt.Scale(domain=ON, range=[RED, BLUE])),
            tooltip=["arm:N", alt.Tooltip("value:Q", format=".4f"), alt.Tooltip(f"{key}:Q", format=".4s")],
        )
        labels = chart.mark_text(align="left", dx=7, fontSize=10, color="#808080").encode(
            x=f"{key}:Q", y="value:Q", text="arm:N"
        )
        specs.append(_spec(alt.layer(dots, labels), 300))
    text = "<p>On the Pareto front, costs within 1 % count as equal. Seconds are of runs that shared the machine.</p>"
    return Section("What was spent for it", text, specs, data)


def _spec(chart: Any, height: Any) -> Spec:
    spec = chart.properties(width="container", height=height).to_dict()
    return {key: value for key, value in spec.items() if key not in ("config", "$schema")}
