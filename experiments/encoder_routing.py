"""Routers of an encoder, Soft MoE among them, at equal active FLOPs beside a dense one: masked language models.

Run:  python -m sparsejax ablate experiments/encoder_routing.py --workdir=runs/encoder_routing --out=experiments
"""

from sparsejax.ablate import Arm, Study, pod

WIDTH = "model.blocks.moe.d_ff"
ROUTED = ("soft_moe", "expert_choice", "switch", "quantile_balanced", "hash")

STUDY = Study(
    question="Which router makes the best encoder at equal active FLOPs?",
    config="configs/routing_arm.py",
    arms={"dense": Arm(argument="encoder_dense")}
    | {name: Arm(argument=f"encoder_{name}", size=WIDTH) for name in ROUTED}
    | {"few_slots": Arm(argument="encoder_soft_moe", edits={"model.blocks.moe.slots_per_expert": 2}, size=WIDTH)},
    base="dense",
    metric="cross_entropy",
    varies=("model.pattern", "model.blocks"),
    deviation=0.02,
    effect=0.035,
    shown=("moe/drop_fraction", "moe/load_max_over_mean", "moe/dead_experts"),
    scales={"pod": pod()},
    notes=(
        "Masked language models of two layers of width 64 that see both ways. `dense` has networks of width 256; in "
        "the others experts take the place of the second: 8 of its width where a token takes one, 16 of half where it "
        "takes two, with twice the slots of an even load. `expert_choice` fills its slots, and that it sees the whole "
        "row is no leak here. `soft_moe` has 16 experts with 8 slots each, so as many slots as a row has tokens: no "
        "token is dropped and none is whole in a slot; `few_slots` has 2 each, whose mixing costs a quarter, and wider "
        "experts. What routers cost is taken from their experts' width.",
    ),
)
