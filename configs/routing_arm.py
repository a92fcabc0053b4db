"""One arm of the study of routing (`experiments/routing.py`): a small model whose second layer routes by a preset.

`dense` has a network of width 256 in place of experts. Others have 8 experts of that width where a token takes one, 16
of half where it takes two, and `fine_grained` 32 of a quarter, of which a token takes three beside one that is shared.
The widths follow `model.d_model`.
Experts have twice the slots of an even load, so that a router is not judged by its drops; expert choice fills its slots
and has no more. The study makes active FLOPs equal. `encoder_ARM` is the same model as a masked language model.

Run:     python -m sparsejax train --config=configs/routing_arm.py:switch --workdir=runs/switch
Expect:  2.1 to 2.3 bits per byte after 800 steps, `thor` 2.7, by arm (experiments/routing.md)
"""

from sparsejax import choose, default_config
from sparsejax.blocks.presets import soft_moe
from sparsejax.data.tasks import TASKS
from sparsejax.routers import presets

EXPERTS = dict(switch=8, base=8, s_base=8, hash=8, rl_r=8, thor=8, fine_grained=32)  # of the others: 16
PRESETS = dict(noisy_top_k="shazeer17", fine_grained="deepseek_moe", loss_free="deepseek_v3")  # of another name


def get_config(arm: str = "switch"):
    config = default_config()
    model, experts = config.model, EXPERTS.get(arm.removeprefix("encoder_"), 16)
    model.d_model, model.num_heads, width = 64, 4, model.get_ref("d_model")
    model.pattern, model.repeats, model.scan = ("dense", "moe"), 1, False
    model.blocks.dense.d_ff = 4 * width
    if arm.startswith("encoder_"):
        arm = arm.removeprefix("encoder_")
        model.causal, model.vocab_size, config.data.task = False, 260, choose(TASKS, "masked")
    if arm == "dense":
        model.pattern = ("dense", "dense")
    elif arm == "soft_moe":
        model.blocks.moe = soft_moe()
        model.blocks.moe.allow_leak = model.causal
        model.blocks.moe.num_experts, model.blocks.moe.slots_per_expert = experts, 128 // experts
        model.blocks.moe.d_ff, model.blocks.moe.gated = 4 * width, model.blocks.dense.gated
    else:
        moe = model.blocks.moe
        moe.router = presets.PRESETS[PRESETS.get(arm, arm)]()
        moe.router.allow_leak = moe.router.allow_leak and model.causal  # an encoder has no future to see
        moe.num_experts, moe.d_ff, moe.group_size = experts, 32 * width // experts, 2048  # the group is the whole step
        if arm != "thor":
            moe.capacity_factor = 1.0 if arm == "expert_choice" else 2.0
        if arm in ("expert_choice", "loss_free", "quantile_balanced", "noisy_top_k"):
            moe.router.selection.k = 2
        if arm == "fine_grained":
            moe.router.selection.k, moe.shared_experts = 3, 1
        if arm == "loss_free":
            moe.router.limit = "none"  # 16 experts are no nodes
            moe.router.controller.rate = 0.02  # the published 0.001 is for thousands of steps, not for hundreds
        if arm == "thor":
            config.train.consistency = 5.0  # two passes a step, so half the steps
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 50
    config.train.steps, config.train.log_every = 800, 50
    config.eval.every, config.eval.batches = 800, 64
    config.checkpoint.every = 800
    return config
