"""What encoders lose and gain that do not compute every token in every layer: classes right against measured time.

Run:  python experiments/tokens.py --workdir=runs/tokens [--arms=begun,full,…] [--seeds=0,1,2] [--out=experiments]

Trains every arm of `configs/tokens_arm.py` with every seed, going on where it was interrupted, evaluates what can be
compacted compactly and `full` also on rows cut short, times all in turn, and writes `tokens.json`, `tokens.md` and
`tokens.svg` to `--out`. Needs matplotlib (`pip install -e '.[dev]'`)."""

import dataclasses
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from sparsejax.base.config import load
from sparsejax.base.sharding import make_mesh, shard_batch
from sparsejax.blocks.skim_methods import TokenMerging
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.timing import interleaved

from arms import (
    ROOT,
    Figures,
    Results,
    Study,
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
from encoders import Encoder, room, shortened

ARMS = runpy.run_path(str(ROOT / "configs" / "tokens_arm.py"))
STUDY = Study(
    name="tokens", config="tokens_arm", arms=ARMS["ARMS"], begin=dict.fromkeys(ARMS["CONTINUED"], ARMS["BEGIN"])
)
CUTS = (64, 96, 128, 160, 192, 224)
"""Lengths of rows on which `full` is evaluated, too."""
RIGHT = "right"
SLACK = 1.1
"""Room of a compact layer over the mean share of tokens that it keeps."""
HEAD = ("arm", "right", "rows / s over full", "ms / batch", "tokens left", "without room")


def figures(run: Path) -> Figures:
    return {"seconds": last_rows(run)["eval"]["seconds"]}


def evaluated(flags, results: Results) -> Results:
    """The results with what every run gets right and how long a batch takes it; rows cut short are arms, too."""
    found: Results = {}
    timed: dict[str, Callable[[], object]] = {}
    mesh = make_mesh(STUDY.experiment("full").mesh)
    with jax.set_mesh(mesh):
        for number, seed in enumerate(flags.seeds.split(",")):
            rows: list[dict[str, np.ndarray]] = []
            for arm, runs in results.items():
                path = flags.workdir / arm / seed
                config = load(ExperimentConfig, str(path / "config.json")).config
                rows = rows or list(eval_batches(open_corpus(config.data), config.data, config.data.batch_size))
                batches = [shard_batch(batch, mesh, 1) for batch in rows]
                encoder = Encoder(config, path, mesh)
                told = encoder.over(batches)
                if arm in ARMS["SKIMMED"]:
                    encoder, told, more = compacted(encoder, path, mesh, batches, told[1])
                    runs[number] |= more
                found.setdefault(arm, []).append(runs[number] | {RIGHT: told[0]})
                if not number:
                    timed[arm] = lambda step=encoder, batch=batches[0]: step.step(step.variables, batch)
                if arm == "full":
                    for length in CUTS:
                        cut = [shard_batch(shortened(batch, length), mesh, 1) for batch in rows]
                        found.setdefault(f"cut_{length}", []).append({RIGHT: encoder.over(cut)[0], "seconds": 0.0})
                        if not number:
                            timed[f"cut_{length}"] = lambda e=encoder, batch=cut[0]: e.step(e.variables, batch)
        seconds = interleaved(timed, 20)
    for arm, runs in found.items():
        gain = float(np.median(seconds["full"] / seconds[arm]))
        found[arm] = [run | {"gain": gain, "ms": 1e3 * float(np.median(seconds[arm]))} for run in runs]
    return found


def compacted(
    encoder: Encoder, path: Path, mesh: jax.sharding.Mesh, batches: Sequence, reports: Sequence
) -> tuple[Encoder, tuple, Figures]:
    """(the encoder that really drops tokens, what it gets right, its figures): room for what the masked one keeps."""
    config = encoder.config
    kept = [[float(r.skim.kept / r.skim.tokens) for r in each.values()] for each in reports]
    skim = dataclasses.replace(config.model.skim, execution="compact", ladder=room(kept, SLACK))
    if not isinstance(skim, TokenMerging):  # which is alike in all stages
        skim = dataclasses.replace(skim, stage="hard")
    model = dataclasses.replace(config.model, skim=skim, scan=False)
    compact = Encoder(dataclasses.replace(config, model=model), path, mesh)
    told = compact.over(batches)
    tokens = sum(int(r.skim.tokens) for each in told[1] for r in each.values())
    lost = sum(int(r.skim.unplaced) for each in told[1] for r in each.values())
    return compact, told, {"left": float(np.mean(kept)), "lost": lost / tokens}


def by_right(results: Results) -> list[str]:
    """Arms, the best first."""
    return sorted(results, key=lambda arm: -mean(results[arm], RIGHT))


def page(results: Results) -> str:
    """A table of means over seeds, best first, as Markdown."""
    shown = {arm: runs for arm, runs in results.items() if arm != ARMS["BEGIN"]}
    lines = [
        "# Encoders that do not compute every token, at equal steps and data",
        "",
        f"`{STUDY.command}` made this page in {minutes(results)};",
        "`configs/tokens_arm.py` is the experiment: which of twelve packages 255 bytes of source come from, four",
        "layers of width 64. `cut_N` is `full` on the first N tokens of each row: static truncation.",
        f"Right is the share of the validation split, mean over {seeds_of(results)} seeds ± the deviation of one run;",
        "times are of the evaluation of a batch of 24 rows, all arms in turn, at the median. Where tokens leave, they",
        f"are gone: every layer has room for {SLACK} times the share that it keeps on average. Tokens left is the mean",
        "over layers; those without room are lost though they were to stay.",
        "",
    ]
    rows = []
    for arm in by_right(shown):
        runs = shown[arm]
        cells = [
            cell(runs, name, form) for name, form in (("gain", ".2f"), ("ms", ".1f"), ("left", ".1%"), ("lost", ".2%"))
        ]
        rows.append([f"`{arm}`", loss_cell(runs, RIGHT), *cells])
    lines += [*table(HEAD, rows), *noise(shown, RIGHT)]
    return "\n".join(lines) + "\n\n![what is right against throughput](tokens.svg)\n"


def draw(results: Results, path: Path) -> None:
    """A dot a run, at the arm's throughput; `full` on shorter and shorter rows is a line."""
    with drawing(path, nrows=1, ncols=1, figsize=(9, 4)) as panel:
        cut = ["full", *(f"cut_{length}" for length in CUTS[::-1] if f"cut_{length}" in results)]
        panel.plot([mean(results[arm], "gain") for arm in cut], [mean(results[arm], RIGHT) for arm in cut], alpha=0.5)
        for arm, runs in results.items():
            if arm == ARMS["BEGIN"]:
                continue
            place, colour = mean(runs, "gain"), "tab:blue" if arm in cut else "tab:red"
            panel.plot([place] * len(runs), column(runs, RIGHT), "o", color=colour, alpha=0.6, markersize=4)
            label = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 8, "color": colour}
            panel.annotate(arm, (place, mean(runs, RIGHT)), **label)
        panel.set_xlabel("rows per second over `full`")
        panel.set_ylabel("right (validation)")
        panel.grid(alpha=0.3)


def main() -> None:
    flags, more = STUDY.flags(__doc__)
    results = evaluated(flags, STUDY.results(flags, more, figures))
    STUDY.write(flags.out, results, page(results))
    draw(results, flags.out / "tokens.svg")


if __name__ == "__main__":
    main()
