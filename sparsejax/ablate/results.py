"""What the runs of a study found: the figures of each, and the verdicts on arms. `NAME.json` keeps it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from sparsejax.ablate.arms import Resolved, costs
from sparsejax.ablate.fairness import Unfair, unfair_runs
from sparsejax.ablate.page import values_of
from sparsejax.ablate.runner import Job
from sparsejax.ablate.speed_up import speed_up
from sparsejax.ablate.statistics import Verdict, detectable, verdicts
from sparsejax.ablate.study import TRAIN, Figures, Study
from sparsejax.base.config import diff
from sparsejax.base.errors import RequestError
from sparsejax.base.writers import json_values, read_jsonl, write_atomically

BY_BATCH = {"cross_entropy": 1.0, "bits_per_byte": 1 / math.log(2)}
"""Metrics that an evaluation leaves by batch, and what they are in nats per target."""


def figures(study: Study, run: Path) -> Figures:
    """Of a finished run: the metric, what the study shows beside it, `seconds` of the run, and the study's own.

    Raises `RequestError` when the metric is none of the run's."""
    found = measured(study, run)
    return found if study.figures is None else found | _kept(study, run)


def measured(study: Study, run: Path) -> Figures:
    """Those that the run's metrics have. Raises as `figures` does."""
    rows = read_jsonl(run / "metrics.jsonl")[0]
    last: dict[str, Mapping[str, Any]] = {row["split"]: row for row in rows}
    evaluation = last["eval"]
    if evaluation.get(study.metric) is None:
        known = ", ".join(name for name, value in evaluation.items() if isinstance(value, (int, float)))
        raise RequestError(f"metric={study.metric!r} is no figure of {run}; those: {known}")
    found = {study.metric: float(evaluation[study.metric]), "seconds": float(evaluation["seconds"])}
    for name in study.shown:
        row = last.get("train", {}) if name.startswith(TRAIN) else evaluation
        value = row.get(name.removeprefix(TRAIN))
        if isinstance(value, (int, float)):
            found[name] = float(value)
    return found


def _kept(study: Study, run: Path) -> Figures:
    """The study's own figures of a run, found once."""
    path = run.with_name(f"{run.name}.figures.json")
    if not path.is_file():
        assert study.figures is not None
        write_atomically(path, json.dumps(study.figures(run)).encode())
    return json.loads(path.read_text())


def by_batch(study: Study, run: Path, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(metric, weight) of each batch of the last evaluation; as one batch where only the whole is known."""
    path = run / "evaluations" / f"{step}.npz"
    if study.metric not in BY_BATCH or not path.is_file():
        return np.array([measured(study, run)[study.metric]]), np.ones(1)
    with np.load(path) as arrays:
        nats, targets = arrays["nats"].astype(np.float64), arrays["targets"].astype(np.float64)
    filled = targets > 0
    return BY_BATCH[study.metric] * nats[filled] / targets[filled], targets[filled]


def judged(study: Study, jobs: Sequence[Job], without: Sequence[str] = ()) -> dict[str, Verdict]:
    """Verdicts of the arms whose runs are all done, but of those `without` one. None where the base is not done."""
    done = [name for name in study.arms if all(job.done for job in jobs if job.arm == name)]
    arms = [name for name in done if not study.arms[name].exploratory and name not in without]
    if study.base not in arms or len(arms) < 2:
        return {}
    runs = {name: [by_batch(study, job.workdir, job.steps) for job in jobs if job.arm == name] for name in arms}
    weights = runs[study.base][0][1]
    if all(np.array_equal(weight, weights) for each in runs.values() for _, weight in each):
        losses = {name: np.stack([metric for metric, _ in each]) for name, each in runs.items()}
    else:  # evaluations of other text, which the study allows
        whole = lambda run: [np.average(run[0], weights=run[1])]  # noqa: E731
        losses = {name: np.array([whole(run) for run in each]) for name, each in runs.items()}
        weights = np.ones(1)
    return verdicts(losses, weights, study.base, higher_is_better=study.higher_is_better)


def flags_of_runs(study: Study, jobs: Sequence[Job]) -> list[Unfair]:
    """What the finished runs of each arm tell beside those of the base."""
    by_name = {(job.arm, job.seed): job for job in jobs if job.done}
    found = []
    for name in study.arms:
        for seed in study.seeds:
            base, run = by_name.get((study.base, seed)), by_name.get((name, seed))
            if name != study.base and base is not None and run is not None:
                found += unfair_runs(base.workdir, run.workdir, name)
    return list({str(each): each for each in found}.values())


def collected(
    study: Study,
    command: str,
    arms: Mapping[str, Resolved],
    budgets: Mapping[str, Resolved],
    jobs: Sequence[Job],
    failed: Mapping[tuple[str, int], str],
    flags: Sequence[Unfair],
    times: Mapping[str, float],
) -> dict[str, Any]:
    """The dict of `NAME.json`: all but times depends on configs and seeds alone."""
    late = flags_of_runs(study, jobs)
    apart = {each.arm for each in late if each.kind not in study.allow}
    judgement = judged(study, jobs, sorted(apart))
    base = arms[study.base].config
    joint = {seed: _together(study, [job for job in jobs if job.seed == seed]) for seed in study.seeds}
    runs_of = lambda name: {  # noqa: E731
        str(job.seed): _run(study, job, failed, joint[job.seed].get(name, {})) for job in jobs if job.arm == name
    }
    variants = dict.fromkeys(name for found in joint.values() for name in found if name not in study.arms)
    longer = {name: {**costs(arm.config), "runs": runs_of(name)} for name, arm in budgets.items()}
    told = {}
    for name, arm in arms.items():
        differs = {key: [repr(before), repr(now)] for key, before, now in diff(base, arm.config)}
        told[name] = {
            **costs(arm.config),
            "step_time": times.get(name),
            "sized": dict(arm.sized),
            "differs": differs,
            "exploratory": arm.arm.exploratory,
            "runs": runs_of(name),
        }
    everything = [run for arm in (*told.values(), *longer.values()) for run in arm["runs"].values()]
    return {
        "study": study.question,
        "command": command,
        "config": study.config,
        "metric": study.metric,
        "higher_is_better": study.higher_is_better,
        "equal": study.equal,
        "base": study.base,
        "seeds": list(study.seeds),
        "notes": list(study.notes),
        "arms": told,
        "budgets": longer,
        "variants": {name: _variant(name, joint) for name in variants},
        "scatter": study.scatter,
        "verdicts": {
            name: dataclasses.asdict(verdict) | {"speed_up": _speed_up(study, told, longer, name, verdict)}
            for name, verdict in judgement.items()
        },
        "power": stated_power(study),
        "flags": [str(each) for each in (*flags, *late)],
        "seconds": sum(run["figures"]["seconds"] for run in everything if run["status"] == "done"),
    }


def _speed_up(
    study: Study, arms: Mapping[str, Any], longer: Mapping[str, Any], name: str, verdict: Verdict
) -> Optional[str]:
    """As text, with its interval: what the verdict's gives; '>' and '<' beyond the base's budgets. None where those
    cannot tell."""
    found = [(arm["training_flops"], values_of(arm, study.metric)) for arm in (arms[study.base], *longer.values())]
    known = [(flops, float(values.mean())) for flops, values in found if values.size]
    if len(known) < 2 or study.higher_is_better or verdict.low is None or verdict.high is None:
        return None
    flops, losses = zip(*known, strict=True)  # the base's own first: there is no verdict without it
    told = []
    for apart in (verdict.difference, verdict.high, verdict.low):
        try:
            ratio, bound = speed_up(flops, losses, arms[name]["training_flops"], losses[0] + apart)
        except ValueError:
            return None
        told.append(f"{bound} {ratio:.2f}".strip())
    return f"{told[0]} [{told[1]}, {told[2]}]"


def stated_power(study: Study) -> dict[str, Any]:
    """What the study can show, as known before it runs."""
    arms = sum(not arm.exploratory for name, arm in study.arms.items() if name != study.base)
    deviation, seeds = study.deviation, len(study.seeds)
    shown = None if deviation is None or seeds < 2 or arms == 0 else detectable(deviation, seeds, arms)
    return {"deviation": deviation, "arms": arms, "seeds": seeds, "detectable": shown}


def _together(study: Study, jobs: Sequence[Job]) -> Mapping[str, Figures]:
    """The study's figures of all finished runs of a seed, found once for these runs."""
    runs = {job.arm: job.workdir for job in jobs if job.done and job.arm in study.arms}
    if study.together is None or study.base not in runs:
        return {}
    path = runs[study.base].parents[1] / f"together.{runs[study.base].name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("arms") != list(runs):
        known = {"arms": list(runs), "figures": study.together(runs)}
        write_atomically(path, json.dumps(known).encode())
    return known["figures"]


def _variant(name: str, joint: Mapping[int, Mapping[str, Figures]]) -> dict[str, Any]:
    found = {str(seed): each[name] for seed, each in joint.items() if name in each}
    return {"runs": {seed: {"status": "done", "figures": each} for seed, each in found.items()}}


def _run(study: Study, job: Job, failed: Mapping[tuple[str, int], str], more: Figures) -> dict[str, Any]:
    if job.done:
        return {"status": "done", "figures": figures(study, job.workdir) | more}
    if (job.arm, job.seed) in failed:
        return {"status": "failed", "cause": failed[job.arm, job.seed]}
    return {"status": "waiting", "cause": f"at step {job.step()} of {job.steps}"}


def text_of(results: Mapping[str, Any]) -> str:
    """Of the file. An unbounded interval has no ends there."""
    return json.dumps(json_values(results), indent=1, ensure_ascii=False) + "\n"
