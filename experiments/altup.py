"""AltUp against plain models that are wider: loss by FLOPs, by the time of a step and by parameters, at equal data.

Run:  python experiments/altup.py --workdir=runs/altup [--arms=dense_64,altup_2,…] [--seeds=0,1,2] [--out=experiments]

Trains every arm of `configs/altup_arm.py` with every seed, going on where it was interrupted, and writes `altup.json`,
`altup.md` and `altup.svg` to `--out`. Needs matplotlib (`pip install -e '.[dev]'`)."""

import runpy
from pathlib import Path

import numpy as np

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
    flops_per_token,
    last_rows,
    loss_cell,
    mean,
    minutes,
    noise,
    parameters,
    seeds_of,
    table,
)

STUDY = Study(name="altup", config="altup_arm", arms=runpy.run_path(str(ROOT / "configs" / "altup_arm.py"))["ARMS"])
SHOWN = ("altup/stream_cosine", "altup/innovation")
AXES = {"flops": "FLOPs / token", "step_ms": "ms / step"}
HEAD = ("arm", "bits per byte", "parameters", "FLOPs / token", "plain, equal FLOPs", "ms / step", "plain, equal time")
REPORTS = ("stream cosine", "innovation")


def figures(run: Path) -> Figures:
    """The loss of the last evaluation and what the streams are in it, and the time of the run."""
    last = last_rows(run)["eval"]
    found = {LOSS: last[LOSS], "seconds": last["seconds"]}
    found["flops"] = flops_per_token(STUDY.experiment(run.parent.name))
    return found | {name: last[name] for name in SHOWN if name in last}


def plain(arm: str) -> bool:
    return arm.startswith("dense")


def of_plain(results: Results, axis: str, value: float) -> float:
    """The loss of a plain model that costs as much, between the plain arms on both sides; NaN beyond them."""
    curve = sorted((mean(runs, axis), mean(runs, LOSS)) for arm, runs in results.items() if plain(arm))
    return float(np.interp(value, *zip(*curve), left=np.nan, right=np.nan)) if curve else np.nan


def page(results: Results) -> str:
    """A table of means over seeds, best first, as Markdown."""
    lines = [
        "# AltUp against wider models at equal data",
        "",
        f"`{STUDY.command}` made this page in {minutes(results)};",
        "`configs/altup_arm.py` is the experiment: four layers, bytes. `dense_D` is the plain model of width D;",
        "`altup_K` and `recycled_K` have K streams of width 64.",
        f"Means over {seeds_of(results)} seeds, ± the deviation of one run; bits per byte and reports on 64",
        "batches spread over the validation split; a step of all arms in turn, at the median. Plain, at equal FLOPs",
        "or equal time, is the loss of a widened plain model that costs as much as the arm, interpolated between the",
        "widths trained; none where the arm costs less than the narrowest or more than the widest.",
        "",
    ]
    rows = []
    for arm in by_loss(results):
        runs = results[arm]
        equal = [of_plain(results, axis, mean(runs, axis)) for axis in AXES]
        by_flops, by_time = ["" if plain(arm) or np.isnan(loss) else f"{loss:.3f}" for loss in equal]
        size = f"{parameters(STUDY.experiment(arm).model)[0]:,}"
        costs = [size, cell(runs, "flops", ",.0f"), by_flops, cell(runs, "step_ms", ".1f"), by_time]
        rows.append([f"`{arm}`", loss_cell(runs), *costs, *(cell(runs, name, ".3f") for name in SHOWN)])
    lines += [*table((*HEAD, *REPORTS), rows), *noise(results)]
    return "\n".join(lines) + "\n\n![loss by FLOPs and by the time of a step](altup.svg)\n"


def draw(results: Results, path: Path) -> None:
    """A dot a run, at the arm's mean cost: loss by each of `AXES`, the plain models joined by a line."""
    colours = {"dense": "tab:blue", "altup": "tab:red", "recycled": "tab:green"}
    with drawing(path, nrows=1, ncols=len(AXES), figsize=(9, 4), sharey=True) as panels:
        for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
            curve = sorted((mean(runs, axis), mean(runs, LOSS)) for arm, runs in results.items() if plain(arm))
            if curve:
                panel.plot(*zip(*curve), color=colours["dense"], alpha=0.5)
            for arm, runs in results.items():
                place, colour = mean(runs, axis), colours[arm.split("_")[0]]
                panel.plot([place] * len(runs), column(runs, LOSS), "o", color=colour, alpha=0.6, markersize=4)
                label = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 8, "color": colour}
                panel.annotate(arm, (place, mean(runs, LOSS)), **label)
            panel.set_xlabel(title)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("bits per byte (validation)")


def main() -> None:
    flags, more = STUDY.flags(__doc__)
    results = STUDY.timed(STUDY.results(flags, more, figures))
    STUDY.write(flags.out, results, page(results))
    draw(results, flags.out / "altup.svg")


if __name__ == "__main__":
    main()
