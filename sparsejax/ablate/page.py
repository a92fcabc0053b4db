"""The result page of a study, as Markdown: what was compared, how, what was found. What a person wrote is kept."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.ablate.match import TOLERANCE
from sparsejax.ablate.statistics import MOST_SEEDS, UNDECIDED, detectable
from sparsejax.base.writers import write_atomically

READING = "## Reading"
"""Heading of what a person writes; all from it on stays when the page is written anew."""
OUTDATED = "*The figures above are not those that this was written of.*"
"""Under that heading, until the person takes it away."""

EQUAL = {
    "active_flops": "active FLOPs of the whole training",
    "total_parameters": "total parameters",
    "tokens": "tokens of the whole training",
    "wall_time": "measured time of the whole training",
    "step_time": "measured time of a training step",
}

Results = Mapping[str, Any]
"""Of `NAME.json`; see `results.collected`."""


def write_page(path: Path, results: Results) -> None:
    """Writes the page beside its figure `NAME.svg`, which `figures.draw` makes."""
    before, found, reading = path.read_text().partition(READING) if path.is_file() else ("", "", "")
    mark = f"<!-- figures {_fingerprint(results)} -->"
    if found and "<!-- figures" in before and mark not in before and OUTDATED not in reading:
        reading = f"\n\n{OUTDATED}{reading}"
    text = "\n".join([*_lines(results, path.stem), "", mark]) + "\n"
    write_atomically(path, (text + (f"\n{found}{reading}" if found else "")).encode())


def _fingerprint(results: Results) -> str:
    """Of what was found, times aside."""
    metric = results["metric"]
    every = {name: values_of(arm, metric).tolist() for name, arm in {**results["arms"], **results["budgets"]}.items()}
    verdicts = {name: verdict["verdict"] for name, verdict in results["verdicts"].items()}
    return hashlib.sha256(json.dumps([every, verdicts]).encode()).hexdigest()[:12]


def values_of(arm: Mapping[str, Any], name: str) -> np.ndarray:
    """A figure of every finished run that has it."""
    runs = (run["figures"] for run in arm["runs"].values() if run["status"] == "done")
    return np.array([figures[name] for figures in runs if name in figures])


def differences(base: Mapping[str, Any], arm: Mapping[str, Any], name: str) -> np.ndarray:
    """Of a figure, arm − base, of every seed with which both have it."""
    figures = lambda which: {  # noqa: E731
        seed: run["figures"][name]
        for seed, run in which["runs"].items()
        if run["status"] == "done" and name in run["figures"]
    }
    first, second = figures(base), figures(arm)
    return np.array([second[seed] - first[seed] for seed in second if seed in first])


def by_metric(results: Results) -> list[str]:
    """Arms that have finished runs, the best first."""
    metric, sign = results["metric"], -1 if results["higher_is_better"] else 1
    means = {
        name: values_of(arm, metric).mean() for name, arm in results["arms"].items() if values_of(arm, metric).size
    }
    return sorted(means, key=lambda name: sign * means[name])


def costs_of(arm: Mapping[str, Any]) -> dict[str, float]:
    """What was spent on an arm that has a finished run."""
    seconds = float(values_of(arm, "seconds").mean())
    return {"flops": arm["training_flops"], "parameters": arm["parameters"], "seconds": seconds}


def pareto(results: Results, spent: str) -> dict[str, tuple[float, float, bool]]:
    """Arm, or the base at another budget → (what was spent on it, mean of the metric, whether it is on the Pareto
    front: none that spent no more is better, where what the study makes equal within 1 % counts as equal)."""
    metric, sign = results["metric"], -1 if results["higher_is_better"] else 1
    every = {**results["arms"], **results["budgets"]}
    found = {
        name: (costs_of(arm)[spent], float(values_of(arm, metric).mean()))
        for name, arm in every.items()
        if values_of(arm, metric).size
    }
    beaten = lambda cost, mean: any(  # noqa: E731
        c <= cost * (1 + TOLERANCE) and sign * m < sign * mean for c, m in found.values()
    )
    return {name: (cost, mean, not beaten(cost, mean)) for name, (cost, mean) in found.items()}


def standing(results: Results, name: str) -> str:
    """What an arm without a verdict is."""
    if name == results["base"]:
        return "base"
    return "exploratory" if results["arms"][name]["exploratory"] else "no verdict"


def without_result(results: Results) -> Iterator[tuple[str, str, str]]:
    """(arm, seed, why) of each run that has none."""
    for name, arm in results["arms"].items():
        for seed, run in arm["runs"].items():
            if run["status"] != "done":
                yield name, seed, f"{run['status']}: {run['cause']}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def spread(values: np.ndarray, form: str = ".3f") -> str:
    """'mean ± deviation of one run'."""
    mean = format(values.mean(), form)
    return f"{mean} ± {format(values.std(ddof=1), form)}" if values.size > 1 else mean


def _lines(results: Results, name: str) -> Iterator[str]:
    yield from (f"# {results['study']}", "")
    minutes = results["seconds"] / 60
    yield f"`{results['command']}` made this page"
    yield f"from runs of {minutes:.0f} minutes together; `{results['config']}` is the experiment. Equal between arms,"
    yield f"within 1 %: {EQUAL[results['equal']]}. Seeds: {_words(results['seeds'])}, which arms share, as they"
    yield "share the order of the data. Means over seeds, ± the deviation of one run."
    for note in results["notes"]:
        yield from ("", note)
    yield ""
    yield from _arms(results)
    yield ""
    yield from _verdicts_explained(results)
    yield from _variants(results)
    yield from _sizes(results)
    yield from _troubles(results)
    yield from ("", f"![{results['metric']} of every arm]({name}.svg)")


def _arms(results: Results) -> list[str]:
    metric, base, shown = results["metric"], results["base"], shown_figures(results)
    verdicts = results["verdicts"]
    faster = has_speed_up(results)
    head = ["arm", metric.replace("_", " "), f"difference from `{base}`", "verdict", "effect size", "seeds needed"]
    rows = []
    for name in by_metric(results):
        arm, verdict = results["arms"][name], verdicts.get(name)
        if verdict is None:
            judged = ["", standing(results, name), "", ""]
        else:
            p = "" if verdict["adjusted_p"] is None else f" (p = {verdict['adjusted_p']:.2g})"
            judged = [interval(verdict), verdict_words(results, verdict) + p, _or_none(verdict["effect_size"], "+.1f")]
            judged.append(seeds_cell(verdict))
        row = [f"`{name}`", spread(values_of(arm, metric)), *judged]
        if faster:
            row.append("" if verdict is None else verdict["speed_up"] or "")
        row += [f"{values_of(arm, each).mean():.3g}" if values_of(arm, each).size else "" for each in shown]
        rows.append(row)
    return table([*head, *(["effective speed-up"] if faster else []), *shown], rows)


def shown_figures(results: Results) -> list[str]:
    """Figures beside the metric, in the order in which runs have them."""
    runs = [run["figures"] for arm in results["arms"].values() for run in arm["runs"].values() if "figures" in run]
    names = dict.fromkeys(name for figures in runs for name in figures)
    return [name for name in names if name not in (results["metric"], "seconds")]


def verdict_words(results: Results, verdict: Mapping[str, Any]) -> str:
    """The verdict, and of one that is open whether it says anything."""
    if verdict["verdict"] != UNDECIDED:
        return verdict["verdict"]
    if verdict["exploratory"]:
        return f"{UNDECIDED}: exploratory"
    return f"{UNDECIDED}, less than {results['power']['effect']:g}"


def _verdicts_explained(results: Results) -> Iterator[str]:
    yield "Verdicts are paired by seed and by batch of the evaluation, with variances lent between arms; intervals hold"
    yield "together at 95 %, p-values are Holm's. Where no arm differs, 5 % of studies say that one does, or 9 % where"
    yield "the runs of one arm deviate eight times as much as others'. *Seeds needed* would show a difference of that"
    yield "size four times in five."
    if any(verdict["exploratory"] for verdict in results["verdicts"].values()):
        effect = results["power"]["effect"]
        less = "" if effect is None else f", nor that it is less than {effect:g}, which is what would matter"
        yield f"An *exploratory* arm is not decided by these runs: they show no difference{less}."
    if any(_reaches_zero(verdict) for verdict in results["verdicts"].values()):
        yield "Holm's correction is the milder one: it shows a difference here whose interval reaches zero."
    if has_speed_up(results):
        yield "*Effective speed-up* is the compute that the base needs for the arm's loss over the arm's own, by whole"
        means = [(name, spread(values_of(arm, results["metric"]))) for name, arm in _trainings(results)]
        yield f"trainings of the base: {', '.join(f'`{name}` {mean}' for name, mean in means)}."
    yield from power_lines(results)


def has_speed_up(results: Results) -> bool:
    """Whether any verdict tells how much of the base's compute it is worth."""
    return any(verdict["speed_up"] for verdict in results["verdicts"].values())


def _trainings(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those of the base that have a finished run, the shortest first."""
    every = {**results["budgets"], results["base"]: results["arms"][results["base"]]}
    for name in sorted(every, key=lambda name: every[name]["training_flops"]):
        if values_of(every[name], results["metric"]).size:
            yield name, every[name]


def _reaches_zero(verdict: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference that is shown does."""
    return verdict["verdict"] != UNDECIDED and verdict["low"] is not None and verdict["low"] <= 0 <= verdict["high"]


def power_lines(results: Results) -> Iterator[str]:
    """What the study could show, as it was known before the runs, and how it came."""
    power = results["power"]
    if power["detectable"] is not None:
        yield f"Stated before the runs: {power['seeds']} seeds show a difference of {power['detectable']:.3f} four"
        yield f"times in five if runs deviate by {power['deviation']:g} and the text of the evaluation adds nothing."
        if power["effect"] is not None:
            needed = seeds_for_effect(power)
            yield f"Less than {power['effect']:g} would not matter; to show that much takes {needed} seeds."
        yield _came(results)
    elif len(results["seeds"]) > 1:
        yield f"Before the runs it was not known by how much they deviate. {_came(results)}"


def _variants(results: Results) -> Iterator[str]:
    """Ways to use trained arms, best first by what goes up in the figure, or as they came."""
    variants = results["variants"]
    if not variants:
        return
    names = dict.fromkeys(name for arm in variants.values() for run in arm["runs"].values() for name in run["figures"])
    head = ["variant", *(name.replace("_", " ") for name in names)]
    rows = [
        [f"`{variant}`", *(spread(values_of(arm, name)) if values_of(arm, name).size else "" for name in names)]
        for variant, arm in variants.items()
    ]
    yield from ("", *table(head, rows))


def _sizes(results: Results) -> Iterator[str]:
    yield ""
    rows = []
    for name, arm in results["arms"].items():
        sized = ", ".join(f"`{key}={value}`" for key, value in arm["sized"].items())
        numbers = (arm["flops_per_token"] / 1e6, arm["parameters"] / 1e6, arm["active_parameters"] / 1e6)
        time = [] if arm["step_time"] is None else [f"{arm['step_time']:.2f}"]
        rows.append([f"`{name}`", *(f"{number:.3f}" for number in numbers), str(arm["steps"]), *time, sized])
    timed = any(len(row) > 6 for row in rows)
    time = ["time of a step, of the base's"] if timed else []
    head = ("arm", "MFLOPs per token, forward", "parameters, millions", "active", "steps", *time, "solved to be equal")
    yield from table(head, rows)
    if timed:
        yield from ("", "Steps were timed in turn with the base's; what else the machine did is in these times.")


def _troubles(results: Results) -> Iterator[str]:
    causes = [f"- `{name}` seed {seed}: {why}" for name, seed, why in without_result(results)]
    if causes:
        yield from ("", "Runs without a result:", "", *causes)
    if results["flags"]:
        head = "Not equal between arms; what the study does not allow has no verdict:"
        yield from ("", head, "", *(f"- {flag}" for flag in results["flags"]))


def seeds_for_effect(power: Mapping[str, Any]) -> str:
    return f"over {MOST_SEEDS}" if power["seeds_needed"] is None else str(power["seeds_needed"])


def _came(results: Results) -> str:
    """How differences from the base deviate between seeds, pooled over the arms that were judged, and what that and the
    text of the evaluation let the study show, as a sentence."""
    metric, base, verdicts = results["metric"], results["arms"][results["base"]], results["verdicts"]
    apart = [differences(base, results["arms"][name], metric) for name in verdicts]
    variances = [each.var(ddof=1) for each in apart if each.size > 1]
    if not variances or not any(variances):
        return "No arm can be judged yet."
    variance = float(np.mean(variances))
    text = float(np.mean([verdict["of_text"] for verdict in verdicts.values()]))
    shown = detectable(variance, len(results["seeds"]), len(verdicts), text=text)
    deviate = f"Differences from `{results['base']}` deviate by {np.sqrt(variance):.3f} between seeds"
    return f"{deviate}, which with that text shows one of {shown:.3f} four times in five."


def seeds_cell(verdict: Mapping[str, Any]) -> str:
    """How many seeds would show such a difference, and whether the text of the evaluation has to be more, too."""
    if verdict["p"] is None:  # one seed says nothing of others
        return ""
    if verdict["seeds_needed"] is not None:
        return str(verdict["seeds_needed"])
    return "> 1000" if verdict["with_more_text"] is None else f"{verdict['with_more_text']} and more text"


def interval(verdict: Mapping[str, Any], form: str = "+.3f") -> str:
    """The difference, and its ends where they are known: with one seed they are not."""
    low, high = verdict["low"], verdict["high"]
    told = "" if low is None else f" [{low:{form}}, {high:{form}}]"
    return f"{verdict['difference']:{form}}{told}"


def _or_none(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _words(values: Sequence[Any]) -> str:
    return ", ".join(f"`{value}`" if isinstance(value, str) else str(value) for value in values)
