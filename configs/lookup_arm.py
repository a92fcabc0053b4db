"""One arm of the study of lookup tables (`experiments/lookup.py`): a small model whose second layer looks something up.

An arm is an address and a consumption, as in token_id-add. All have the forward FLOPs of `dense`, which has no table,
within 1 %: what addresses and consumptions multiply is taken from the width of both feed-forward networks. All have 256
rows, as many as there are ids, so that what differs is how one of them is chosen. Row data are 64 numbers, or, of an
expert of rank 4, 512.

Run:     python -m sparsejax train --config=configs/lookup_arm.py:token_id-add --workdir=runs/token_id-add
Expect:  2.2 to 2.4 bits per byte after 600 steps, by arm as in experiments/lookup.md
"""

from bisect import bisect_right

from sparsejax import default_config
from sparsejax.base.config import from_config_dict
from sparsejax.blocks.dense import DenseSpec
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consumes import Add, Expert
from sparsejax.memory.contents import PartialExpert, Vector
from sparsejax.memory.learned import Softmax
from sparsejax.memory.lsh import Hyperplanes
from sparsejax.memory.projections import Concat
from sparsejax.memory.token_ids import TokenId
from sparsejax.model.cost import mean_keys, total
from sparsejax.train.config import ExperimentConfig

ADDRESSES = {"token_id": TokenId(), "lsh": Hyperplanes(bits=8), "softmax": Softmax(entries=256)}
CONSUMES = {"add": (Vector(), Add()), "concat": (Vector(), Concat()), "expert": (PartialExpert(rank=4), Expert())}
ARMS = ("dense", *(f"{address}-{consume}" for address in ADDRESSES for consume in CONSUMES))


def get_config(arm: str = "token_id-add"):
    config = default_config()
    model = config.model
    model.d_model, model.num_heads, model.scan = 64, 4, False
    model.pattern, model.repeats = ("dense", "dense"), 1
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 50
    config.train.steps, config.train.log_every = 600, 50
    config.eval.every, config.eval.batches = 600, 64
    config.checkpoint.every = 600
    budget = flops_at(config, 256)
    if arm != "dense":
        address, consume = arm.split("-")
        content, consumption = CONSUMES[consume]
        spec = {"address": ADDRESSES[address], "content": content, "consume": consumption}
        model.blocks.with_memory, model.pattern = DenseSpec(), ("dense", "with_memory")
        model.memory.table = MemorySpec(**spec, blocks=("with_memory",), place="parallel")
        config.optimizer.tables.learning_rate = 5e-3
    flops_at(config, bisect_right(range(257), budget, lo=1, key=lambda d_ff: flops_at(config, d_ff)) - 1)
    return config


def flops_at(config, d_ff: int) -> float:
    """Of a token's forward pass, after setting the width of the feed-forward networks."""
    for name in set(config.model.pattern):
        config.model.blocks[name].d_ff = d_ff
    model, length = from_config_dict(ExperimentConfig, config).model, config.data.sequence_length
    return total(model).flops(mean_keys(model, length), length)
