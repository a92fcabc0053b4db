"""What decoders lose and gain that leave early or skip layers: bits per byte against measured time.

Run:  python experiments/exits.py --workdir=runs/exits [--arms=full,exits,…] [--seeds=0,1,2] [--out=experiments]

Trains every arm of `configs/exits_arm.py` with every seed, going on where it was interrupted, scores windows of the
validation split as a decoder meets them, token by token and one row at a time, the model with exits by every rule, and
writes `exits.json`, `exits.md` and `exits.svg` to `--out`. Needs matplotlib (`pip install -e '.[dev]'`)."""

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import jax
import numpy as np

from sparsejax.base.config import load
from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.infer.early_exit import EarlyExit
from sparsejax.infer.generate import Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables

from arms import (
    LOSS,
    ROOT,
    Figures,
    Results,
    Study,
    by_loss,
    cell,
    column,
    drawing,
    last_rows,
    loss_cell,
    mean,
    minutes,
    noise,
    seeds_of,
    table,
)

ARMS = runpy.run_path(str(ROOT / "configs" / "exits_arm.py"))
STUDY = Study(name="exits", config="exits_arm", arms=ARMS["ARMS"])
PROMPT = 16
"""Tokens of a window that are read in one pass; those after it are scored."""
WINDOWS, ROUNDS = 8, 3
RULES = {
    "max_prob": (0.3, 0.5, 0.7, 0.9),
    "margin": (0.2, 0.4, 0.6, 0.8),
    "entropy": (0.5, 1.0, 1.5, 2.0),
    "state_similarity": (0.9, 0.95, 0.98),
    "patience": (1.0, 2.0),
}
"""Rule → thresholds."""
HEAD = ("arm", "bits per byte", "speed over full", "ms / token", "mean layer")


@dataclass
class Decoder:
    """A trained arm that scores windows."""

    generator: Generator
    variables: object
    threshold: Optional[float] = None

    def __call__(self, windows: np.ndarray) -> tuple[float, float, Optional[float]]:
        """(bits per byte, seconds per token, mean layer)."""
        found = [
            self.generator.score(self.variables, [row[:PROMPT]], [row[PROMPT:]], self.threshold) for row in windows
        ]
        nats = np.mean([each.nll[0] for each in found])
        seconds = sum(each.decode_seconds for each in found) / (windows.shape[0] * (windows.shape[1] - PROMPT))
        depths = [each.depths[0] for each in found if each.depths is not None]
        return float(nats / np.log(2)), seconds, float(np.mean(depths)) if depths else None


def figures(run: Path) -> Figures:
    return {"seconds": last_rows(run)["eval"]["seconds"]}


def decoders(arm: str, run: Path, mesh: jax.sharding.Mesh) -> dict[str, Decoder]:
    """The arm, and by every rule and threshold, if it has exits."""
    config = load(ExperimentConfig, str(run / "config.json")).config
    variables, greedy = restore_variables(config, run, mesh)[0], Sampling(temperature=0)
    found = {arm: Decoder(Generator(config.model, greedy), variables)}
    if config.model.exits.depths:
        for rule, thresholds in RULES.items():
            by_rule = Generator(config.model, greedy, decoding=EarlyExit(rule=rule, threshold=thresholds[0]))
            found |= {f"{rule} {limit:g}": Decoder(by_rule, variables, limit) for limit in thresholds}
    return found


def decoded(results: Results, workdir: Path, seeds: list[str]) -> Results:
    """The results with bits per byte and time of every arm, rule and threshold; all take turns with `full`."""
    found: Results = {}
    data = STUDY.experiment("full").data
    batches = eval_batches(open_corpus(data), data, 1, WINDOWS)
    windows = np.concatenate([np.asarray(batch["tokens"]) for batch in batches])
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        for number, seed in enumerate(seeds):
            each: dict[str, Decoder] = {}
            for arm in results:
                each |= decoders(arm, workdir / arm / seed, mesh)
            turns = []
            for turn in range(1 + ROUNDS):  # compiles in the first
                told = {name: decoder(windows) for name, decoder in each.items()}
                turns += [told] if turn else []
            for name, (bits, _, layer) in turns[0].items():
                seconds = [turn[name][1] for turn in turns]
                gains = [turn["full"][1] / turn[name][1] for turn in turns]
                run = {LOSS: bits, "ms": 1e3 * float(np.median(seconds)), "gain": float(np.median(gains))}
                run |= {} if layer is None else {"layer": layer}
                run |= {"seconds": results[name][number]["seconds"] if name in results else 0.0}
                found.setdefault(name, []).append(run)
    return found


def page(results: Results) -> str:
    """A table of means over seeds, best first, as Markdown."""
    lines = [
        "# Decoders that leave early or skip layers, at equal steps and data",
        "",
        f"`{STUDY.command}` made this page in {minutes(results)};",
        "`configs/exits_arm.py` is the experiment: six layers of width 96, bytes. `depth_N` has N layers, which is",
        "static truncation; the rules with their thresholds decide in the model `exits` where a token leaves, and what",
        "deeper layers remember of it is made from the state that it left with (`propagate`).",
        f"Means over {seeds_of(results)} seeds, ± the deviation of one run; bits per byte and time of {WINDOWS}",
        "windows of the validation split, decoded token by token at batch 1, all arms in turn.",
        "",
    ]
    rows = []
    for arm in by_loss(results):
        runs = results[arm]
        cells = [cell(runs, name, form) for name, form in (("gain", ".2f"), ("ms", ".3f"), ("layer", ".2f"))]
        rows.append([f"`{arm}`", loss_cell(runs), *cells])
    lines += [*table(HEAD, rows), *noise(results)]
    return "\n".join(lines) + "\n\n![bits per byte against speed](exits.svg)\n"


def draw(results: Results, path: Path) -> None:
    """A dot a run, at the arm's speed; thresholds of a rule, and truncated models, are lines."""
    families = {"static": ["full", *(f"depth_{n}" for n in ARMS["EXITS"][::-1])]}
    families |= {rule: [f"{rule} {limit:g}" for limit in thresholds] for rule, thresholds in RULES.items()}
    families |= {arm: [arm] for arm in ("exits", "depths", "depths_random")}
    with drawing(path, nrows=1, ncols=1, figsize=(9, 5)) as panel:
        for number, (family, arms) in enumerate(families.items()):
            arms = [arm for arm in arms if arm in results]
            places = [mean(results[arm], "gain") for arm in arms]
            panel.plot(places, [mean(results[arm], LOSS) for arm in arms], color=f"C{number}", alpha=0.5, label=family)
            for arm, place in zip(arms, places, strict=True):
                values = column(results[arm], LOSS)
                panel.plot([place] * len(values), values, "o", color=f"C{number}", alpha=0.6, markersize=4)
        panel.set_xlabel("tokens per second over `full`")
        panel.set_ylabel("bits per byte (validation)")
        panel.legend()
        panel.grid(alpha=0.3)


def main() -> None:
    flags, more = STUDY.flags(__doc__)
    trained = STUDY.results(flags, more, figures)
    results = decoded(trained, flags.workdir, flags.seeds.split(","))
    STUDY.write(flags.out, results, page(results))
    draw(results, flags.out / "exits.svg")


if __name__ == "__main__":
    main()
