"""One FLOP budget, spent five ways and in pairs: experts, tables, AltUp's streams, token selection, early exits.

Run:  python -m sparsejax ablate experiments/mechanisms.py --workdir=runs/mechanisms --out=experiments
"""

from sparsejax.ablate import Arm, Study, pod

WIDTH = "model.blocks.dense.d_ff"
ARMS = {
    "experts": WIDTH,
    "table": WIDTH,
    "streams": WIDTH,
    "depths": "train.steps",  # it saves, so it may train for longer
    "exits": WIDTH,
    "experts+table": WIDTH,
    "experts+streams": WIDTH,
    "experts+depths": "train.steps",
    "table+streams": WIDTH,
    "table+depths": "train.steps",
}
"""Arm → what is solved to make its FLOPs equal."""

STUDY = Study(
    question="Where does one FLOP budget go furthest: experts, tables, streams, skipped tokens or exits?",
    config="configs/mechanisms_arm.py",
    arms={"plain": Arm(argument="plain")} | {name: Arm(argument=name, size=key) for name, key in ARMS.items()},
    base="plain",
    varies=("model.pattern", "model.blocks", "model.memory", "model.streams", "model.select", "model.exits",
            "optimizer.tables"),
    deviation=0.02,
    effect=0.05,
    budgets=(0.5, 2.0),
    shown=("moe/drop_fraction", "moe/load_max_over_mean", "select/keep_fraction", "memory/rows_touched"),
    scales={"pod": pod()},
    notes=(
        "`plain` has four layers of width 64. `experts`: two of 16 in every second layer; `table`: a partial expert by "
        "token id in the others; `streams`: recycled AltUp; `depths`: every second layer on an eighth of the tokens, "
        "with what that saves spent on more steps; `exits`: heads after layers 1 to 3, while the whole model is what "
        "is judged. "
        "What a mechanism adds to the FLOPs is taken from the width of the networks.",
    ),
)  # fmt: skip
