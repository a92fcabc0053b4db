"""Tokens that stop when they have had enough: adaptive computation time over the six layers of a small dense decoder
(arXiv:1603.08983), the same with one layer six times, a Universal Transformer (`:universal`, arXiv:1807.03819),
A-ViT (`:a_vit`, arXiv:2112.07658), or PonderNet (`:ponder_net`, arXiv:2107.05407). `:plain` runs all layers.

Run:     python -m sparsejax train --config=configs/halting.py --workdir=runs/halting
         python -m sparsejax train --config=configs/halting.py:universal --workdir=runs/universal
Expect:  3.18 bits per byte on 8 batches of the validation split at step 100, 2.0 of the 6 layers run by a token
         (`:universal` 3.24 and 1.4, `:a_vit` 3.22 and 1.8, `:ponder_net` 3.19 and 2.2, `:plain` 3.29: one seed
         each, and too few steps to rank them); in training 4.85 at step 20 and 3.54 at 100 (`:universal` 4.92 and
         3.59, `:a_vit` 4.96 and 3.56, `:ponder_net` 4.87 and 3.56, `:plain` 4.89 and 3.57)
"""

from sparsejax import choose, default_config
from sparsejax.blocks import HALTINGS


def get_config(arm="act"):
    config = default_config()
    model = config.model
    model.d_model, model.num_heads = 96, 4
    model.pattern, model.repeats = ("dense",), 6
    if arm == "universal":
        model.tied_repeats = True
    if arm != "plain":
        model.halting = choose(HALTINGS, "act" if arm == "universal" else arm)
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 3e-3, 0.98
    config.optimizer.schedule.warmup_steps = 30
    config.train.steps = 100
    config.eval.every, config.eval.batches = 100, 8
    config.checkpoint.every = 100
    return config
