"""Mixture-of-Depths (arXiv:2404.02258): every second layer of the quickstart, dense, on an eighth of the tokens.

Four layers, d = 96, bytes as tokens. A predictor chooses in evaluation and generation. `:random` draws lots, `:plain`
computes all.

Run:     python -m sparsejax train --config=configs/mixture_of_depths.py --workdir=runs/depths
         python -m sparsejax train --config=configs/mixture_of_depths.py:random --workdir=runs/lots
Expect:  2.69 bits per byte on 32 batches of the validation split at step 150 with 11 % of the tokens chosen
         (`:random` 2.71, `:plain` 2.74: one seed each, and too few steps to rank them); in training 4.54 at step 20
         and 2.90 at 100 (`:random` 4.54 and 2.92, `:plain` 4.52 and 2.95)
"""

from sparsejax import choose, default_config
from sparsejax.blocks import BLOCKS, SELECTIONS


def get_config(arm="mixture_of_depths"):
    config = default_config()
    model = config.model
    model.d_model, model.num_heads = 96, 4
    model.blocks.deep = choose(BLOCKS, "dense")
    model.pattern, model.repeats = ("dense", "deep"), 2
    model.scan = False  # two repeats: unrolled, a step is a little faster on CPU
    if arm != "plain":
        model.select = choose(SELECTIONS, arm)
        model.select.capacity, model.select.blocks = 0.125, ("deep",)
    config.data.sequence_length, config.data.batch_size = 128, 32
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 30
    config.train.steps = 150
    config.eval.every, config.eval.batches = 150, 32
    config.checkpoint.every = 150
    return config
