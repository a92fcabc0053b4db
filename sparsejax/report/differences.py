"""In what the configs of runs differ, and where each value came from."""

import html
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparsejax.report.runs import Run
from sparsejax.report.section import Absent, Section
from sparsejax.report.tables import table

ABSENT = "–"
RECORDED = ("packages", "corpus", "platform", "devices", "processes", "python", "tables")
"""What a run's environment says beside its config that may explain a difference."""


class Value(NamedTuple):
    """A setting of one run, as JSON text."""

    text: str
    source: str  # 'default', 'file', 'command line', or "" where nothing is known


def config_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Value]]:
    """Key → the value of every run, of those keys in which they differ, in the order of the schema.

    Args:
      configs: what `config.json` holds, of each run.
    """
    flat = [dict(_leaves(saved.get("config", {}))) for saved in configs]
    sources = [saved.get("provenance", {}) for saved in configs]
    found = {}
    for key in dict.fromkeys(key for each in flat for key in each):
        texts = [json.dumps(each[key]) if key in each else ABSENT for each in flat]
        if len(set(texts)) > 1:
            found[key] = [Value(text, str(source.get(key, ""))) for text, source in zip(texts, sources, strict=True)]
    return found


def difference_section(runs: Sequence[Run]) -> Section | Absent:
    """The settings that differ, and what else was recorded and differs."""
    if len(runs) < 2:
        return Absent("Differences", "one run alone differs from nothing: report RUN RUN shows several")
    settings = config_differences([run.saved for run in runs])
    around = [{key: run.saved["environment"].get(key) for key in RECORDED} for run in runs]
    recorded = config_differences([{"config": each} for each in around])
    titles = ["setting", *(html.escape(run.name) for run in runs)]
    rows = [[f"<code>{_breakable(key)}</code>", *map(_cell, values)] for key, values in settings.items()]
    more = [[html.escape(key), *map(_cell, values)] for key, values in recorded.items()]
    parts = [table(titles, rows, len(titles)) if rows else "<p>The configs are the same.</p>"]
    if more:
        parts.append("<h3>Recorded, and different</h3>" + table(titles, more, len(titles)))
    return Section("Differences", "".join(parts))


def command_section(runs: Sequence[Run]) -> Section | Absent:
    """What repeats each run, and what was typed."""
    parts = []
    for run in runs:
        if not (run.path / "config.json").is_file():
            continue
        saved, again = shlex.quote(str(run.path / "config.json")), shlex.quote(f"{run.path}-again")
        typed = run.saved["environment"].get("command") or []
        repeat = f"python -m sparsejax train --config={saved} --workdir={again}"
        was = f"\n# it was begun by\n{shlex.join(['python', *map(str, typed)])}" if typed else ""
        packages = run.saved["environment"].get("packages") or {}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        python = run.saved["environment"].get("python")
        told = html.escape(f"Python {python}, {versions}" if versions else "versions unknown")
        text = html.escape(f"{repeat}{was}")
        parts.append(f'<div><h3>{html.escape(run.name)}</h3><pre>{text}</pre><p class="faint">{told}</p></div>')
    if not parts:
        return Absent("Commands", "no run has a config.json, from which train --config= repeats it")
    return Section("Commands", f'<div class="beside">{"".join(parts)}</div>')


def _breakable(key: str) -> str:
    """A setting's name, which narrow screens break between its words."""
    return html.escape(key).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _cell(value: Value) -> str:
    source = f' <span class="faint">{html.escape(value.source)}</span>' if value.source else ""
    return f"<code>{html.escape(value.text)}</code>{source}"


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, node
