"""Switch-style mixture of experts on the source of the Python standard library: the default experiment.

Four layers, every other one with 8 experts of which a token takes one (Switch Transformers, arXiv:2101.03961), bytes
as tokens.

Run:     make quickstart
         python -m sparsejax train --config=configs/quickstart.py --workdir=runs/quickstart
Expect:  2.18 bits per byte on 32 batches spread over the validation split, 2.23 on all of it (`eval
         --config.eval.batches=none`), no dead expert, under 1 % of pairs dropped at the end. In training, bits per
         byte are 7.87 at step 1, 4.56 at 20, 3.23 at 60, 2.91 at 100, 2.24 at 200, 2.22 at 300

A group is the whole step, so batches cannot be split: for a mesh with data or expert above 1, set group_size lower.
"""

from sparsejax import choose, default_config
from sparsejax.routers.weights import WEIGHTS


def get_config():
    config = default_config()
    model, moe = config.model, config.model.blocks.moe
    model.d_model, model.num_heads = 96, 4
    model.pattern, model.repeats = ("dense", "moe"), 2
    model.scan = False  # two repeats: unrolled, a step is a little faster on CPU
    moe.num_experts, moe.capacity_factor = 8, 1.25
    moe.group_size = 4096  # the whole step: in small groups chance alone would overfill experts
    moe.router.selection.k, moe.router.weight = 1, choose(WEIGHTS, "raw")
    moe.router.balance.coefficient = 0.02
    config.data.sequence_length, config.data.batch_size = 128, 32
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 30
    config.train.steps = 300
    config.eval.every, config.eval.batches = 150, 32
    config.checkpoint.every = 150
    return config
