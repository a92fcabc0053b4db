"""How routers compare when nothing else differs: loss and balance of presets at equal active FLOPs and equal data.

Run:  python experiments/routers.py --workdir=runs/routers [--arms=switch,base,…] [--seeds=0,1,2] [--out=experiments]

Trains every arm of `configs/router_arm.py` with every seed, going on where it was interrupted, and writes
`routers.json`, `routers.md` and `routers.svg` to `--out`. Needs matplotlib (`pip install -e '.[dev]'`)."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np

from sparsejax.cli import main as sparsejax

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "router_arm.py"
SHOWN = ("bits_per_byte", "moe/load_max_over_mean", "moe/drop_fraction", "moe/dead_experts", "moe/experts_per_token")
SEES_FUTURE = ("vmoe_bpr", "expert_choice", "base", "s_base")
"""In training. The first two in evaluation, too, so their loss is not one of a language model."""


def row_of(arm: str, seed: int, workdir: Path, more: list[str]) -> dict[str, float]:
    """The last evaluation of one run, which is trained unless it is finished, with the loads of training's end."""
    run = workdir / arm / str(seed)
    words = ["train", f"--config={CONFIG}:{arm}", f"--workdir={run}", f"--config.train.seed={seed}", *more]
    if status := sparsejax(words):
        sys.exit(status)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {split: [row for row in rows if row["split"] == split][-1] for split in ("train", "eval")}
    both = {"bits_per_byte": last["eval"]["bits_per_byte"]}
    return both | {name: last["train"][name] for name in SHOWN[1:] if name in last["train"]}


def page(results: dict[str, list[dict[str, float]]], command: str) -> str:
    """A table of means over seeds, best first, as Markdown."""
    seeds = len(next(iter(results.values())))
    lines = [
        "# Routers at equal active FLOPs and equal data",
        "",
        f"`{command}` made this page;",
        f"`configs/router_arm.py` is the experiment. Means over {seeds} seeds, ± the deviation of one run; bits per",
        "byte on 64 batches spread over the validation split, loads of the last 50 steps of training. Experts met is",
        "what a token was processed by, in experts of width 256: 1 is the FLOPs of `dense`.",
        "",
        "| arm | bits per byte | experts met | largest load / mean | dropped | dead experts |",
        "|---|---|---|---|---|---|",
    ]
    for arm in sorted(results, key=lambda arm: np.mean([row["bits_per_byte"] for row in results[arm]])):
        value = lambda name: np.array([row.get(name, np.nan) for row in results[arm]])  # noqa: E731
        bits, load, drop, dead, met = (value(name) for name in SHOWN)
        mark = "*" if arm in SEES_FUTURE else ""
        width = 1 if arm in runpy.run_path(str(CONFIG))["ONE"] else 2
        sparse = f"{met.mean() / width:.2f} | {load.mean():.2f} | {drop.mean():.1%} | {dead.mean():.1f}"
        sparse = sparse if arm != "dense" else "1.00 | | |"
        lines.append(f"| `{arm}`{mark} | {bits.mean():.3f} ± {_deviation(bits):.3f} | {sparse} |")
    if seeds > 1:
        spread = np.mean([_deviation([row["bits_per_byte"] for row in rows]) ** 2 for rows in results.values()]) ** 0.5
        noise = 2 * spread * (2 / seeds) ** 0.5
        lines += [
            "",
            f"Two arms less than {noise:.3f} apart are not told apart: that is twice the standard error of a",
            f"difference of means, where one run of an arm deviates by {spread:.3f}.",
        ]
    lines += [
        "",
        "\\* chooses by what comes later, in training; `expert_choice` and `vmoe_bpr` in evaluation as well.",
    ]
    return "\n".join(lines) + "\n\n![loss and balance of every arm](routers.svg)\n"


def _deviation(values: list[float] | np.ndarray) -> float:
    """Of one run, estimated from several; 0 where there is only one."""
    return float(np.std(values, ddof=1)) if np.size(values) > 1 else 0.0


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A dot a run, the mean as a line: bits per byte, and the largest load over the mean."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    arms = sorted(results, key=lambda arm: -np.mean([row["bits_per_byte"] for row in results[arm]]))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 0.32 * len(arms) + 1), sharey=True, layout="constrained")
    for panel, name, title in zip(panels, SHOWN, ("bits per byte (validation)", "largest load / mean"), strict=False):
        for place, arm in enumerate(arms):
            values = [row[name] for row in results[arm] if name in row]
            if values:
                panel.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6, markersize=4)
                panel.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color="tab:red")
        panel.set_title(title)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(arms)), [arm + "*" * (arm in SEES_FUTURE) for arm in arms])
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    arms = runpy.run_path(str(CONFIG))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(("dense", *arms["ONE"], *arms["TWO"])))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments")
    flags, more = parser.parse_known_args()
    results = {
        arm: [row_of(arm, int(seed), flags.workdir, more) for seed in flags.seeds.split(",")]
        for arm in flags.arms.split(",")
    }
    command = "python experiments/routers.py --workdir=runs/routers"
    (flags.out / "routers.json").write_text(json.dumps(results, indent=1) + "\n")
    (flags.out / "routers.md").write_text(page(results, command))
    draw(results, flags.out / "routers.svg")


if __name__ == "__main__":
    main()
