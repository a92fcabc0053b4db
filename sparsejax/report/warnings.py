"""The alerts of runs, as the log of training would have told them."""

import html
from collections.abc import Sequence

from sparsejax.base.alerts import WINDOWS, Alert, Seen
from sparsejax.report.runs import Run
from sparsejax.report.section import Section
from sparsejax.train.watch import found_in

LOOKED_AT = 400
"""The newest windows of a run whose alerts are shown: each has a file of arrays to be read."""


def alert_section(runs: Sequence[Run]) -> Section:
    """Every trouble once, with the steps at which it held; runs without any in one line."""
    parts, quiet = [], []
    for run in runs:
        found, name = episodes(run), html.escape(run.name)
        if not found:
            quiet.append(name)
            continue
        parts += [f"<h3>{name}</h3>"] if len(runs) > 1 else []
        parts += [_told(alerts) for alerts in found]
    if quiet:
        whose = f" in {', '.join(quiet)}" if len(runs) > 1 else ""
        parts.append(f'<p class="faint">No alert{whose}.</p>')
    return Section("Alerts", "".join(parts))


def episodes(run: Run) -> list[list[Alert]]:
    """The alerts of one trouble in a row, by their first step."""
    config = None if run.config is None else run.config.model
    rows = run.split("train")[-LOOKED_AT:]
    having = set(run.steps("routing"))
    history: list[Seen] = []
    open_now: dict[tuple[str, str], list[Alert]] = {}
    found: list[list[Alert]] = []
    for row in rows:
        arrays = run.arrays("routing", row["step"]) if row["step"] in having else {}
        history = [*history, Seen(row, arrays)][-WINDOWS:]
        now = {alert.about: alert for alert in found_in(history, config)}
        for about, alert in now.items():
            if about not in open_now:
                found.append([])
                open_now[about] = found[-1]
            open_now[about].append(alert)
        open_now = {about: alerts for about, alerts in open_now.items() if about in now}
    return found


def _told(alerts: Sequence[Alert]) -> str:
    first, last = alerts[0], alerts[-1]
    when = f"step {first.step}" if len(alerts) == 1 else f"steps {first.step} to {last.step}"
    where = f" in {html.escape(last.layer)}" if last.layer else ""
    return (
        f'<div class="alert"><strong>⚠ {html.escape(last.kind)}</strong>{where}, {when}: {html.escape(last.text)}.<br>'
        f"Likely cause: {html.escape(last.cause)}.<br>To try: {html.escape(last.remedy)}.</div>"
    )
