"""The `ablate` command: from the file of a study to its verdicts."""

import argparse
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sparsejax.ablate.arms import Overrides, Resolved, flops_per_token, resolve
from sparsejax.ablate.cluster import Cluster
from sparsejax.ablate.fairness import Unfair, refuse, unfair
from sparsejax.ablate.figures import draw
from sparsejax.ablate.known import check_names
from sparsejax.ablate.machine import slots
from sparsejax.ablate.match import BY_LEDGER, Measure, at_budget, matched
from sparsejax.ablate.page import (
    interval,
    seeds_for_effect,
    standing,
    values_of,
    verdict_words,
    without_result,
    write_page,
)
from sparsejax.ablate.results import collected, flags_of_runs, measured, stated_power, text_of
from sparsejax.ablate.runner import Job, run_all
from sparsejax.ablate.sections import write_report
from sparsejax.ablate.study import Study, chosen, load_study
from sparsejax.ablate.timed import StepTimes
from sparsejax.base.config import diff, from_json
from sparsejax.base.errors import RequestError
from sparsejax.base.writers import write_atomically
from sparsejax.model.cost import total
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.workdir import open_workdir

SEED = "train.seed"


def ablate_command(args: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Runs what is not run yet and writes `NAME.json`, `NAME.md`, its figures and `report.html`. 1 if a run failed."""
    jax.config.update("jax_platforms", "cpu")  # the runs' own processes take the accelerators
    study = chosen(load_study(args.study), args.arms, args.seeds)
    seed = dict(overrides).get(SEED)
    if seed is not None:
        raise RequestError(f"--config.{SEED}={seed} has no effect: seeds are the study's; --seeds=N,N,… sets them")
    root, edits = args.study.absolute().parents[1], (*study.edits_of(args.scale), *overrides)
    if args.launch is not None and study.equal not in BY_LEDGER:
        raise RequestError(
            f"--launch: equal={study.equal!r} is measured by this process; call ablate without it, inside of a job"
        )
    with open_workdir(args.workdir) as workdir:
        arms = _sized(study, root, edits, workdir)
        flags = refuse(unfair(study, arms), study.allow)
        check_names(study, arms)
        budgets = {budget_name(study, each): at_budget(study, root, edits, each) for each in study.budgets}
        every = {**arms, **budgets}
        jobs = _jobs(every, study, workdir)
        stem = args.study.stem if args.scale is None else f"{args.study.stem}_{args.scale}"
        cluster = None if args.launch is None else Cluster(shlex.split(args.launch), stem, jobs)
        waiting = next((job for job in jobs if not job.done), None)
        if cluster is not None and waiting is not None:
            cluster.check(waiting, every[waiting.arm].text)
        say = functools.partial(print, flush=True)
        for line in _plan(study, arms, flags, jobs):
            say(line)
        if args.dry_run:
            return 0
        _write_configs(every, workdir)
        if cluster is None:
            runs = args.jobs or slots(max(total(arm.config.model).parameters for arm in arms.values()))
            failed = run_all(jobs, runs, say, check=_Check(study, jobs, say))
        else:
            failed = cluster.run(say)
        command = "python -m sparsejax " + shlex.join(args.words)
        # The machine that hands runs to a cluster is not the one that they take their time on.
        times = _times(arms, arms[study.base], workdir) if study.timed and cluster is None else {}
        results = collected(study, command, arms, budgets, jobs, failed, flags, times)
        _write(stem, results, workdir, args.out)
        write_report(workdir / "report.html", results, jobs)
        for line in told(results):
            say(line)
    return 1 if failed else 0


class _Check:
    """Looks at each run as it ends: a metric that it lacks ends the study, and an unfair pair is told at once."""

    def __init__(self, study: Study, jobs: Sequence[Job], say: Callable[[str], None]):
        self.study, self.jobs, self.say = study, jobs, say
        self.told: set[Unfair] = set()

    def __call__(self, job: Job) -> None:
        measured(self.study, job.workdir)
        for each in flags_of_runs(self.study, [one for one in self.jobs if one.seed == job.seed]):
            if each not in self.told:
                self.told.add(each)
                self.say(f"flagged: {each}" + ("" if each.kind in self.study.allow else "; it gets no verdict"))


def budget_name(study: Study, times: float) -> str:
    """The folder of the base trained for so many times its steps."""
    return f"{study.base}@{times:g}"


def _sized(study: Study, root: Path, edits: Overrides, workdir: Path) -> dict[str, Resolved]:
    if study.equal in BY_LEDGER:
        return matched(study, root, edits, BY_LEDGER[study.equal])
    times = StepTimes(workdir, resolve(study, root, study.base, edits).config)
    of_step = study.equal == "step_time"
    measure: Measure = lambda config: times.ratio(config) * (1 if of_step else config.train.steps)  # noqa: E731
    return matched(study, root, edits, measure)


def _times(arms: Mapping[str, Resolved], base: Resolved, workdir: Path) -> dict[str, float]:
    """Of a training step of each arm, over the base's."""
    steps = StepTimes(workdir, base.config)
    return {name: steps.ratio(arm.config) for name, arm in arms.items()}


def _jobs(arms: Mapping[str, Resolved], study: Study, workdir: Path) -> list[Job]:
    """Seeds in the outer loop: what is compiled for an arm is there for its other seeds, and all arms soon have one."""
    found: dict[tuple[str, int], Job] = {}
    for seed in study.seeds:
        for name, arm in arms.items():
            begin = None if arm.arm.begin is None else found[arm.arm.begin, seed]
            folder = workdir / name
            found[name, seed] = Job(
                arm=name,
                seed=seed,
                config=folder / "config.json",
                workdir=folder / str(seed),
                steps=arm.config.train.steps,
                begin=begin,
            )
    return list(found.values())


def _write_configs(arms: Mapping[str, Resolved], workdir: Path) -> None:
    """Raises `RequestError` when the folder holds an arm of that name with another config."""
    for name, arm in arms.items():
        path = workdir / name / "config.json"
        if path.is_file():
            before = from_json(ExperimentConfig, path.read_text(), str(path)).config
            changed = diff(before, arm.config)
            if changed:
                key, old, new = changed[0]
                more = "" if len(changed) == 1 else f" (and {len(changed) - 1} more)"
                raise RequestError(
                    f"{workdir} holds arm {name} with another config: config.{key} was {old!r}, is {new!r}{more}; "
                    "use another --workdir"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, arm.text.encode())


def _plan(study: Study, arms: Mapping[str, Resolved], flags: Sequence[Unfair], jobs: Sequence[Job]) -> list[str]:
    """What is going to be compared, before anything runs."""
    lines = [study.question, f"equal: {study.equal}; metric: {study.metric}; base: {study.base}"]
    width = max(map(len, arms))
    for name, arm in arms.items():
        cost = total(arm.config.model)
        solved = "".join(f", {key}={value}" for key, value in arm.sized.items())
        lines.append(
            f"  {name:<{width}}  {flops_per_token(arm.config) / 1e6:.3f} MFLOPs per token, "
            f"{cost.parameters / 1e6:.3f}M parameters, {arm.config.train.steps} steps{solved}"
        )
    lines += [f"flagged: {each}" for each in flags]
    power = stated_power(study)
    if power["detectable"] is None:
        lines.append("power: not known before the runs (Study.deviation, of single runs, and two seeds would tell)")
    else:
        lines.append(
            f"power: {len(study.seeds)} seeds show a difference of {power['detectable']:.4f} in {study.metric} "
            f"four times in five, if runs deviate by {study.deviation:g}"
        )
        if study.effect is not None:
            lines.append(
                f"power: less than {study.effect:g} would not matter; to show that much takes "
                f"{seeds_for_effect(power)} seeds, and arms that stay open with fewer are exploratory"
            )
    done = sum(job.done for job in jobs)
    return [*lines, f"{len(jobs)} runs, {done} of them done"]


def _write(name: str, results: Mapping[str, Any], workdir: Path, out: Path | None) -> None:
    for folder in (workdir, out):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"{name}.json", text_of(results).encode())
            draw(folder / f"{name}.svg", results)
            write_page(folder / f"{name}.md", results)


def told(results: Mapping[str, Any]) -> list[str]:
    """The verdicts, in lines."""
    lines, metric = [], results["metric"]
    for name, arm in results["arms"].items():
        values = values_of(arm, metric)
        mean = f"{values.mean():.4f}" if values.size else "no run is done"
        verdict = results["verdicts"].get(name)
        if verdict is None:
            why = standing(results, name)
        else:
            why = f"{verdict_words(results, verdict)} ({interval(verdict, '+.4f')})"
        lines.append(f"{name}: {mean}: {why}")
    return lines + [f"  {name} seed {seed}: {why}" for name, seed, why in without_result(results)]
