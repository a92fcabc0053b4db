"""What the runs of a study found: the figures of each, and the verdicts on arms. `NAME.json` keeps it."""

import ast
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from scipy import stats

from sparsejax.ablate.arms import Resolved, costs
from sparsejax.ablate.fairness import Unfair, unfair_runs
from sparsejax.ablate.page import differences, values_of
from sparsejax.ablate.runner import Job
from sparsejax.ablate.speed_up import speed_up
from sparsejax.ablate.statistics import Verdict, detectable, seeds_needed, verdicts
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
    assert study.figures is not None
    find = study.figures
    return _once(run.with_name(f"{run.name}.figures.json"), [written_as(find)], lambda: find(run))


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
    return verdicts(losses, weights, study.base, higher_is_better=study.higher_is_better, effect=study.effect)


def flags_of_runs(study: Study, jobs: Sequence[Job]) -> list[Unfair]:
    """What the finished runs of each arm tell beside those of the base, each once."""
    bases = {job.seed: job for job in jobs if job.arm == study.base and job.done}
    others = [job for job in jobs if job.arm in study.arms and job.arm != study.base and job.seed in bases and job.done]
    found = [each for job in others for each in unfair_runs(bases[job.seed].workdir, job.workdir, job.arm)]
    return list(dict.fromkeys(found))


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
    """As text, with its interval: what the ends of the verdict's give, by the base's losses at its budgets as they are
    or as they may be; '>' and '<' beyond those budgets. None where they cannot tell."""
    base = arms[study.base]
    budgets = [arm for arm in longer.values() if values_of(arm, study.metric).size]
    if not budgets or study.higher_is_better or verdict.low is None or verdict.high is None:
        return None
    own, spent = float(values_of(base, study.metric).mean()), arms[name]["training_flops"]
    flops = [base["training_flops"], *(arm["training_flops"] for arm in budgets)]
    apart = np.array([values_of(arm, study.metric).mean() - own for arm in budgets])
    reach = _reach([differences(base, arm, study.metric) for arm in budgets])
    at = lambda difference, shift: speed_up(flops, [own, *(own + apart + shift)], spent, own + difference)  # noqa: E731
    try:
        found = at(verdict.difference, 0.0)
        low = min(at(verdict.high, shift) for shift in (-reach, 0.0, reach))
        high = max(at(verdict.low, shift) for shift in (-reach, 0.0, reach))
    except ValueError:
        return None
    least, middle, most = (f"{bound} {ratio:.2f}".strip() for ratio, bound in (low, found, high))
    return f"{middle} [{least}, {most}]"


def _reach(apart: Sequence[np.ndarray], level: float = 0.05) -> float:
    """Half the interval of the mean of such differences between seeds, by their common variance."""
    several = [each for each in apart if each.size > 1]
    if not several:
        return 0.0
    left = sum(each.size - 1 for each in several)
    variance = sum(each.var(ddof=1) * (each.size - 1) for each in several) / left
    return float(stats.t.isf(level / 2, left) * np.sqrt(variance / min(each.size for each in several)))


def stated_power(study: Study) -> dict[str, Any]:
    """What the study can show, as known before it runs."""
    arms = sum(not arm.exploratory for name, arm in study.arms.items() if name != study.base)
    seeds, effect = len(study.seeds), study.effect
    told = {"deviation": study.deviation, "arms": arms, "seeds": seeds, "effect": effect}
    if study.deviation is None or arms == 0:
        return told | {"detectable": None, "seeds_needed": None}
    # Runs of two arms with the same seed are taken as independent, which is the worst that pairing can be.
    variance = 2 * study.deviation**2
    shown = None if seeds < 2 else detectable(variance, seeds, arms)
    return told | {
        "detectable": shown,
        "seeds_needed": None if effect is None else seeds_needed(effect, variance, arms),
    }


def _together(study: Study, jobs: Sequence[Job]) -> Mapping[str, Figures]:
    """The study's figures of all finished runs of a seed, found once for these runs."""
    runs = {job.arm: job.workdir for job in jobs if job.done and job.arm in study.arms}
    if study.together is None or study.base not in runs:
        return {}
    path = runs[study.base].parents[1] / f"together.{runs[study.base].name}.json"
    find = study.together
    return _once(path, [written_as(find), *runs], lambda: find(runs))


def _once(path: Path, of: Sequence[str], find: Callable[[], Any]) -> Any:
    """What is found, kept in a file, and found anew only when it is of something else."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("of") != list(of):
        known = {"of": list(of), "figures": find()}
        write_atomically(path, json.dumps(known).encode())
    return known["figures"]


def written_as(function: Callable[..., Any]) -> str:
    """Of the code of a study's function: changes with its file, except for the STUDY itself and for comments."""
    body = ast.parse(Path(function.__code__.co_filename).read_text()).body
    is_study = lambda node: isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STUDY"  # noqa: E731
    code = "\n".join(ast.unparse(node) for node in body[1:] if not is_study(node))
    return hashlib.sha256(f"{function.__name__}\n{code}".encode()).hexdigest()[:16]


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
