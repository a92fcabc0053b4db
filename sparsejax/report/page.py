"""One HTML file that shows runs, needs nothing beside itself and asks no server for anything."""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert

from sparsejax.base.writers import json_values, write_atomically
from sparsejax.report.differences import command_section, difference_section
from sparsejax.report.explorer import explorer_section
from sparsejax.report.ledger import ledger_section
from sparsejax.report.loads import balance_section, drop_section, load_section
from sparsejax.report.losses import loss_section
from sparsejax.report.passages import (
    churn_section,
    depth_section,
    position_section,
    specialisation_section,
    table_section,
)
from sparsejax.report.runs import Run, open_runs
from sparsejax.report.section import Absent, Section
from sparsejax.report.streams import stream_section
from sparsejax.report.warnings import alert_section

__all__ = ["Section", "write_page"]

HERE = Path(__file__).parent
BUILDERS: tuple[Callable[[Sequence[Run]], Section | Absent], ...] = (
    alert_section,
    difference_section,
    loss_section,
    load_section,
    balance_section,
    drop_section,
    position_section,
    churn_section,
    specialisation_section,
    table_section,
    stream_section,
    depth_section,
    explorer_section,
    ledger_section,
    command_section,
)
"""The chapters in their order. Each says what the runs lack when it has nothing to show."""

# Vega compiles its expressions, which a policy calls eval. Nothing may be fetched: a slip would be an error.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"


def write_page(path: Path, runs: Sequence[Path], title: str, sections: Sequence[Section] = ()) -> None:
    """Writes the page of these run folders to `path`, `sections` before the runs' own.

    Raises:
      RequestError: a folder is not that of a run, or a file in it is broken; nothing has been written then.
      RunError: the disk refuses the page.
    """
    opened = open_runs(runs)
    built = [build(opened) for build in BUILDERS] if opened else []
    shown = [*sections, *(each for each in built if isinstance(each, Section))]
    absent = [each for each in built if isinstance(each, Absent)]
    write_atomically(path, page(title, shown, absent).encode())


def page(title: str, sections: Sequence[Section], absent: Sequence[Absent] = ()) -> str:
    """The HTML text."""
    specs: list[Mapping[str, Any]] = []
    data: dict[str, Any] = {}
    parts = []
    for number, section in enumerate(sections):
        doubled = sorted(set(section.data) & set(data))
        if doubled:
            raise ValueError(f"two sections have data sets named {', '.join(doubled)}")
        data |= section.data
        figures = "".join(
            f'<figure><div data-spec="{len(specs) + place}"></div></figure>' for place in range(len(section.charts))
        )
        specs += section.charts
        charts = f'<div class="charts">{figures}</div>' if figures else ""
        parts.append(
            f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>\n{section.html}\n{charts}</section>'
        )
    links = "".join(f'<a href="#s{n}">{html.escape(section.title)}</a>' for n, section in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css")}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<nav aria-label="sections">{links}</nav>
<main>
{"".join(parts)}
{_left_out(absent)}
</main>
<script type="application/json" id="specs">{_json(specs)}</script>
<script type="application/json" id="data">{_json(data)}</script>
<script>{_inert(_bundle())}</script>
<script>{_asset("page.js")}</script>
<script>{_asset("explorer.js")}</script>
</body>
</html>
"""


def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed, with everything they need."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _left_out(absent: Sequence[Absent]) -> str:
    if not absent:
        return ""
    lines = "".join(
        f"<li><strong>{html.escape(each.title)}</strong>: {html.escape(each.line)}.</li>" for each in absent
    )
    return f'<section id="absent"><h2>Not on this page</h2><ul>{lines}</ul></section>'


def _asset(name: str) -> str:
    return _inert((HERE / name).read_text())


def _inert(script: str) -> str:
    """A script that cannot end its own element."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(value: Any) -> str:
    text = json.dumps(json_values(value), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c")
