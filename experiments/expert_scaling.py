"""Experts from 1 to 32 at equal active FLOPs, by three routers, dropless: the shape of Clark et al. (arXiv:2202.01169).

Run:  python -m sparsejax ablate experiments/expert_scaling.py --workdir=runs/expert_scaling --out=experiments
      python -m sparsejax ablate experiments/expert_scaling.py --workdir=runs/expert_scaling_32 --scale=width_32
Fit:  python -m sparsejax.ablate.scaling experiments/expert_scaling*.json --out=experiments
"""

from ml_collections import ConfigDict

from sparsejax import default_config
from sparsejax.ablate import Arm, Study

EXPERTS = (2, 4, 8, 16, 32)
ROUTERS = ("s_base", "rl_r", "hash")
NUMBER, WIDTH = "model.blocks.moe.num_experts", "model.blocks.moe.d_ff"


def dropless(config: ConfigDict) -> None:
    """With slots, more experts drop more of an uneven load, and would be judged by that."""
    moe = config.model.blocks.moe
    moe.dispatch, moe.capacity_factor = "grouped", default_config().model.blocks.moe.capacity_factor
    if moe.router.selection.name != "s_base":  # which alone chooses for a whole group
        moe.group_size = None


STUDY = Study(
    question="What do more experts give at equal active FLOPs?",
    config="configs/routing_arm.py",
    arms={"dense": Arm(argument="dense")}
    | {
        f"{router}-e{number}": Arm(argument=router, edits={NUMBER: number}, edit=dropless, size=WIDTH)
        for router in ROUTERS
        for number in EXPERTS
    },
    base="dense",
    varies=("model.pattern", "model.blocks"),
    deviation=0.03,
    effect=0.05,
    shown=("moe/load_max_over_mean", "moe/dead_experts"),
    scales={
        "width_32": {"model.d_model": 32, "model.num_heads": 2},
        "width_128": {"model.d_model": 128, "model.num_heads": 8},
    },
    notes=(
        "The second of two layers has so many experts of four times the model's width (64, or 32 with "
        "`--scale=width_32`), one of which a token meets, and nothing is dropped: the routers that "
        "Clark et al. compare.",
    ),
)
