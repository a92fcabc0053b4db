"""One arm of the study of routers (`experiments/routers.py`): a small model whose second layer routes by a preset.

All arms have the same active FLOPs, data order, optimizer and number of expert parameters: 8 experts of width 256 where
a token takes one, 16 of width 128 where it takes two. `dense` has one network of width 256 in their place. Experts have
twice the slots of an even load, so that a router is not judged by its drops; those that fill their slots have no more.

Run:     python -m sparsejax train --config=configs/router_arm.py:switch --workdir=runs/switch
Expect:  2.97 to 3.11 bits per byte after 150 steps, by arm (experiments/routers.md)
"""

from sparsejax import default_config
from sparsejax.routers import presets

ONE = ("switch", "base", "s_base", "hash")
TWO = ("gshard", "mixtral", "vmoe_bpr", "expert_choice", "remoe", "deepseek_v3", "quantile_balanced")


def get_config(arm: str = "switch"):
    config = default_config()
    model, moe = config.model, config.model.blocks.moe
    model.d_model, model.num_heads = 64, 4
    model.pattern, model.repeats, model.scan = ("dense", "dense" if arm == "dense" else "moe"), 1, False
    model.blocks.dense.d_ff = 256
    if arm != "dense":
        k = 1 if arm in ONE else 2
        moe.router = presets.PRESETS[arm]()
        moe.num_experts, moe.d_ff = 8 * k, 256 // k
        moe.group_size = 2048  # the whole step
        if arm in ("expert_choice", "remoe", "deepseek_v3", "quantile_balanced"):
            moe.router.selection.k = k
        moe.capacity_factor = 1.0 if arm == "expert_choice" else 2.0
        if arm == "deepseek_v3":
            moe.router.limit = "none"  # 16 experts are no nodes
            moe.router.controller.rate = 0.02  # the published 0.001 is for thousands of steps, not for 150
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 20
    config.train.steps, config.train.log_every = 150, 50
    config.eval.every, config.eval.batches = 150, 64
    config.checkpoint.every = 150
    return config
