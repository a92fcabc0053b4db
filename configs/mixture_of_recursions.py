"""Mixture-of-Recursions (arXiv:2507.10524): between a first and a last layer, one layer three times, on all tokens,
then on two thirds and on a third of them.

Bytes as tokens, d = 96. A predictor of each recursion chooses in evaluation and generation. `:random_recursions` draws
lots, `:tied` computes all, `:untied` with a layer for every repeat.

Run:     python -m sparsejax train --config=configs/mixture_of_recursions.py --workdir=runs/recursions
         python -m sparsejax train --config=configs/mixture_of_recursions.py:random_recursions --workdir=runs/lots
Expect:  2.69 bits per byte on 32 batches of the validation split at step 150, with 74 % of the tokens chosen on average
         (`:random_recursions` 2.81, `:tied` 2.79, `:untied` 2.80: one seed each, and too few steps to rank them); in
         training 4.55 at step 20 and 2.91 at 100 (`:random_recursions` 4.61 and 3.01, `:tied` 4.65 and 3.03,
         `:untied` 4.59 and 3.02)
"""

from sparsejax import choose, default_config
from sparsejax.blocks import BLOCKS, SELECTIONS


def get_config(arm="mixture_of_recursions"):
    config = default_config()
    model = config.model
    model.d_model, model.num_heads = 96, 4
    model.blocks.again = choose(BLOCKS, "dense")
    model.prefix, model.pattern, model.suffix = ("dense",), ("again",), ("dense",)
    model.repeats, model.tied_repeats, model.scan = 3, arm != "untied", False  # each recursion has a shape of its own
    if arm in ("mixture_of_recursions", "random_recursions"):
        model.select = choose(SELECTIONS, arm)
        model.select.capacity, model.select.blocks = 1 / 3, ("again",)
    config.data.sequence_length, config.data.batch_size = 128, 32
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 30
    config.train.steps = 150
    config.eval.every, config.eval.batches = 150, 32
    config.checkpoint.every = 150
    return config
