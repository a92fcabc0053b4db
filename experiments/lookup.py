"""What a table that is looked up brings at equal FLOPs and equal data, by how it is addressed and how it is consumed.

Run:  python experiments/lookup.py --workdir=runs/lookup [--arms=dense,lsh-add,…] [--seeds=0,1,2] [--out=experiments]

Trains every arm of `configs/lookup_arm.py` with every seed, going on where it was interrupted, and writes
`lookup.json`, `lookup.md` and `lookup.svg` to `--out`. Needs matplotlib (`pip install -e '.[dev]'`)."""

import runpy
from pathlib import Path

from arms import (
    LOSS,
    ROOT,
    Figures,
    Results,
    Study,
    by_loss,
    cell,
    draw_runs,
    flops_per_token,
    last_rows,
    loss_cell,
    minutes,
    noise,
    parameters,
    seeds_of,
    table,
)

STUDY = Study(name="lookup", config="lookup_arm", arms=runpy.run_path(str(ROOT / "configs" / "lookup_arm.py"))["ARMS"])
SHOWN = ("memory/bucket_entropy", "memory/max_load", "memory/rows_touched")
HEAD = ("arm", "bits per byte", "d_ff", "FLOPs / token", "parameters", "active", "in tables", "ms / step")
REPORTS = ("bucket entropy", "largest load", "rows touched")


def figures(run: Path) -> Figures:
    """The loss of the last evaluation and what the table was asked for in it, the time of the run."""
    last = last_rows(run)["eval"]
    found = {LOSS: last[LOSS], "seconds": last["seconds"]}
    return found | {name: last[name] for name in SHOWN if name in last}


def page(results: Results) -> str:
    """A table of means over seeds, best first, as Markdown."""
    lines = [
        "# Lookup tables at equal FLOPs and equal data",
        "",
        f"`{STUDY.command}` made this page in {minutes(results)};",
        "`configs/lookup_arm.py` is the experiment: two layers, in the second a table of 256 rows beside the",
        "feed-forward network. An arm is an address and a consumption. What they multiply was taken from `d_ff`, the",
        "width of both layers' feed-forward networks: the widest with which a token's forward pass has no more FLOPs",
        "than that of `dense`.",
        f"Means over {seeds_of(results)} seeds, ± the deviation of one run; bits per byte and reports on 64",
        "batches spread over the validation split. Bucket entropy is 1 where all rows are looked up equally often, the",
        "largest load the share of lookups that goes to one row.",
        "",
    ]
    rows = []
    for arm in by_loss(results):
        runs, experiment = results[arm], STUDY.experiment(arm)
        whole, active, stored = parameters(experiment.model)
        sizes = (experiment.model.blocks["dense"].d_ff, flops_per_token(experiment), whole, active, stored)
        reports = [cell(runs, name, form) for name, form in zip(SHOWN, (".2f", ".1%", ".0f"))]
        cost = [*(f"{size:,.0f}" for size in sizes), cell(runs, "step_ms", ".1f")]
        rows.append([f"`{arm}`", loss_cell(runs), *cost, *reports])
    lines += [*table((*HEAD, *REPORTS), rows), *noise(results)]
    return "\n".join(lines) + "\n\n![loss and bucket entropy of every arm](lookup.svg)\n"


def main() -> None:
    flags, more = STUDY.flags(__doc__)
    results = STUDY.timed(STUDY.results(flags, more, figures))
    STUDY.write(flags.out, results, page(results))
    draw_runs(flags.out / "lookup.svg", results, {LOSS: "bits per byte (validation)", SHOWN[0]: "bucket entropy"})


if __name__ == "__main__":
    main()
