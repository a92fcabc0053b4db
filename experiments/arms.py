"""What the studies in this folder share: the arms of one config file, each trained with several seeds, their figures,
the table and the drawing of a result page.

An arm is the argument of a config file (`configs/NAME_arm.py:ARM`), a figure one number of one run."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.base.config import load
from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.cli import main as sparsejax
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import component_costs, mean_keys, total
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.timing import Step, interleaved

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

LOSS = "bits_per_byte"
READING = "## Reading"

Figures = dict[str, float]
"""Of one run, by name."""
Results = dict[str, list[Figures]]
"""Arm → the figures of each seed."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study `experiments/NAME.py` with the experiment `configs/CONFIG.py:ARM`."""

    name: str
    config: str
    arms: tuple[str, ...]
    begin: Mapping[str, str] = field(default_factory=dict)
    """Arm → the arm, trained before it, whose parameters it begins with."""

    @property
    def command(self) -> str:
        return f"python experiments/{self.name}.py --workdir=runs/{self.name}"

    def file(self, arm: str) -> str:
        return f"{ROOT / 'configs' / self.config}.py:{arm}"

    def experiment(self, arm: str) -> ExperimentConfig:
        return load(ExperimentConfig, self.file(arm)).config

    def flags(self, doc: str | None) -> tuple[argparse.Namespace, list[str]]:
        """(the command line's flags, what else is on it: overrides of the config)."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--workdir", type=Path, required=True)
        parser.add_argument("--arms", default=",".join(self.arms))
        parser.add_argument("--seeds", default="0,1,2")
        parser.add_argument("--out", type=Path, default=ROOT / "experiments")
        return parser.parse_known_args()

    def results(self, flags: argparse.Namespace, more: list[str], figures: Callable[[Path], Figures]) -> Results:
        """Trains what is not trained yet. Arms take turns, so that what slows the machine for a while slows all. A
        program that one seed has compiled comes from the cache for the next."""
        arms: Results = {arm: [] for arm in flags.arms.split(",")}
        for seed in flags.seeds.split(","):
            for arm, found in arms.items():
                run = flags.workdir / arm / seed
                words = [f"--config={self.file(arm)}", f"--workdir={run}", f"--config.train.seed={seed}", *more]
                if arm in self.begin:
                    words.append(f"--init-from={flags.workdir / self.begin[arm] / seed}")
                if status := sparsejax(["train", *words]):
                    sys.exit(status)
                found.append(figures(run))
        return arms

    def timed(self, results: Results, rounds: int = 20) -> Results:
        """The results with `step_ms`, the median time of a training step of every arm: all in this process and in turn,
        for runs that were trained one after the other met a machine that was busy or not."""
        experiments = {arm: self.experiment(arm) for arm in results}
        with jax.set_mesh(make_mesh(MeshConfig())):
            steps = {arm: Step(each) for arm, each in experiments.items()}
            seconds = interleaved(steps, rounds)
        middle = {arm: 1e3 * float(np.median(taken)) for arm, taken in seconds.items()}
        return {arm: [run | {"step_ms": middle[arm]} for run in runs] for arm, runs in results.items()}

    def write(self, out: Path, results: Results, page: str) -> None:
        """`NAME.json` and `NAME.md`; of a page that is there already, what stands under `READING` is kept."""
        path = out / f"{self.name}.md"
        _, found, reading = path.read_text().partition(READING) if path.is_file() else ("", "", "")
        (out / f"{self.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        path.write_text(page + (f"\n{found}{reading}" if found else ""))


def last_rows(run: Path) -> dict[str, dict[str, Any]]:
    """The run's last row of metrics of each split."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["split"]: row for row in rows}


def minutes(results: Results) -> str:
    """Of all runs' training and evaluation, as a sentence's part."""
    return f"{sum(run['seconds'] for runs in results.values() for run in runs) / 60:.0f} minutes"


def flops_per_token(experiment: ExperimentConfig) -> float:
    """Of a forward pass on a row of one document."""
    return total(experiment.model).flops(mean_keys(experiment.model, experiment.data.sequence_length))


def parameters(model: ModelConfig) -> tuple[int, int, int]:
    """(all, active for one token, in lookup tables)."""
    costs, whole = component_costs(model), total(model)
    return whole.parameters, whole.active, costs["memory_table"].parameters if "memory_table" in costs else 0


def seeds_of(results: Results) -> int:
    return len(next(iter(results.values())))


def column(runs: Sequence[Figures], name: str) -> np.ndarray:
    """A figure of every run, NaN where a run has none."""
    return np.array([run.get(name, np.nan) for run in runs])


def mean(runs: Sequence[Figures], name: str) -> float:
    return float(column(runs, name).mean())


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """Of one run, estimated from several; 0 where there is only one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def loss_cell(runs: Sequence[Figures], name: str = LOSS) -> str:
    return f"{mean(runs, name):.3f} ± {deviation(column(runs, name)):.3f}"


def cell(runs: Sequence[Figures], name: str, form: str) -> str:
    """The mean over runs, or nothing where the arm has no such figure."""
    value = mean(runs, name)
    return "" if np.isnan(value) else format(value, form)


def by_loss(results: Results) -> list[str]:
    """Arms, the best first."""
    return sorted(results, key=lambda arm: mean(results[arm], LOSS))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def noise(results: Results, name: str = LOSS) -> list[str]:
    """Which differences of the table say nothing, in lines of Markdown."""
    seeds = seeds_of(results)
    if seeds < 2:
        return []
    spread = np.mean([deviation(column(runs, name)) ** 2 for runs in results.values()]) ** 0.5
    apart = 2 * spread * (2 / seeds) ** 0.5
    return [
        "",
        f"Two arms less than {apart:.3f} apart are not told apart: that is twice the standard error of a",
        f"difference of means, where one run of an arm deviates by {spread:.3f}.",
    ]


@contextlib.contextmanager
def drawing(path: Path, **layout: Any) -> Iterator[Any]:
    """The panels of a figure, saved afterwards: on no background, in a grey that is read on white and on black."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#808080")
    with pyplot.rc_context(grey | {"legend.framealpha": 0}):
        figure, panels = pyplot.subplots(layout="constrained", **layout)
        yield panels
        figure.savefig(path, metadata={"Date": None}, transparent=True)
        pyplot.close(figure)


def draw_runs(path: Path, results: Results, panels: Mapping[str, str], mark: Callable[[str], str] = str) -> None:
    """A dot a run, the mean as a line, an arm a line of the figure. `panels`: figure → its title."""
    arms = by_loss(results)[::-1]
    with drawing(path, nrows=1, ncols=len(panels), figsize=(9, 0.32 * len(arms) + 1), sharey=True) as drawn:
        for panel, (name, title) in zip(drawn, panels.items(), strict=True):
            for place, arm in enumerate(arms):
                values = [run[name] for run in results[arm] if name in run]
                if values:
                    panel.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6, markersize=4)
                    panel.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color="tab:red")
            panel.set_title(title)
            panel.grid(axis="x", alpha=0.3)
        drawn[0].set_yticks(range(len(arms)), [mark(arm) for arm in arms])
