"""The routers of the founding papers at equal active FLOPs, data and schedule, beside a dense model.

Run:  python -m sparsejax ablate experiments/routing.py --workdir=runs/routing --out=experiments
"""

from pathlib import Path

from sparsejax.ablate import Arm, Study, pod
from sparsejax.ablate.leak import leak

ROUTED = ("switch", "gshard", "noisy_top_k", "expert_choice", "base", "s_base", "hash", "rl_r", "fine_grained")
ROUTED += ("loss_free", "quantile_balanced")


def leaked(run: Path) -> dict[str, float]:
    """What later tokens change in evaluation: nothing, in a causal model whose experts have slots enough."""
    return {"leak": leak(run)}


STUDY = Study(
    question="Which router makes the best language model at equal active FLOPs?",
    config="configs/routing_arm.py",
    arms={
        "dense": Arm(argument="dense"),
        **{name: Arm(argument=name, size="model.blocks.moe.d_ff") for name in ROUTED},
        "thor": Arm(argument="thor", size="train.steps"),
    },
    base="dense",
    varies=("model.pattern", "model.blocks", "train.consistency"),
    deviation=0.02,
    effect=0.05,
    budgets=(0.5, 2.0),
    shown=("moe/drop_fraction", "moe/load_max_over_mean", "moe/dead_experts", "moe/router_entropy"),
    figures=leaked,
    scales={"pod": pod()},
    notes=(
        "`dense` has two layers of width 64 with networks of width 256; in the others experts take the place of the "
        "second network: 8 of its width where a token takes one, 16 of half where it takes two, 32 of a quarter in "
        "`fine_grained`, where a token takes three beside a shared one. What routers cost is taken from their experts' "
        "width. `thor` passes over every token twice a step, so it makes half the steps.",
        "Experts have twice the slots of an even load; those of `expert_choice` are all filled. `leak` is what the "
        "loss of the first half of a row changes when the second half becomes another, in nats per target: "
        "`expert_choice` sees the future, and its loss is not that of a language model.",
    ),
)
