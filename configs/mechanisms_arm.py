"""One arm of the study of mechanisms (`experiments/mechanisms.py`): ways to spend parameters or compute conditionally.

`plain` has four layers of width 64. Words after it, joined by `+`, add to it: `experts` (two of 16 in every second
layer), `table` (a partial expert of 256 rows by token id, in the others), `streams` (recycled AltUp with two),
`depths` (Mixture-of-Depths: every second layer on an eighth of the tokens), `exits` (heads after layers 1 to 3, trained
with the model). The study makes the FLOPs of the whole training equal.

Run:     python -m sparsejax train --config=configs/mechanisms_arm.py:experts+table --workdir=runs/both
Expect:  2.1 to 2.2 bits per byte after 600 steps, by arm as in experiments/mechanisms.md
"""

from sparsejax import choose, default_config
from sparsejax.blocks import BLOCKS, SELECTIONS
from sparsejax.blocks.altup import AltUp
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consumes import Expert
from sparsejax.memory.contents import PartialExpert
from sparsejax.memory.token_ids import TokenId
from sparsejax.routers import presets


def get_config(arm: str = "plain"):
    config = default_config()
    model, words = config.model, set(arm.split("+")) - {"plain"}
    model.d_model, model.num_heads = 64, 4
    width = model.get_ref("d_model")
    second = "moe" if "experts" in words else "second"
    model.blocks.dense.d_ff = 4 * width
    model.pattern, model.repeats, model.scan = ("dense", second), 2, False
    if second == "second":
        model.blocks.second = choose(BLOCKS, "dense")
        model.blocks.second.d_ff = 4 * width
    else:
        moe = model.blocks.moe
        moe.router = presets.mixtral()
        moe.num_experts, moe.d_ff, moe.capacity_factor = 16, 2 * width, 2.0
        moe.group_size = 256 if "depths" in words else 2048  # the step's tokens that get there
    if "table" in words:
        content = PartialExpert(rank=4)
        model.memory.table = MemorySpec(
            address=TokenId(), content=content, consume=Expert(), blocks=("dense",), place="parallel"
        )
        config.optimizer.tables.learning_rate = 5e-3
    if "streams" in words:
        model.streams = AltUp(streams=2)
    if "depths" in words:
        model.select = choose(SELECTIONS, "mixture_of_depths")
        model.select.capacity, model.select.blocks = 0.125, (second,)
    if "exits" in words:
        model.exits = "heads"
        model.exits.layers, model.exits.weights, model.exits.scale = (1, 2, 3), "sum_l", 0.2
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 50
    config.train.steps, config.train.log_every = 600, 50
    config.eval.every, config.eval.batches = 600, 64
    config.checkpoint.every = 600
    return config
