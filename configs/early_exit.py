"""A language model that can stop early: exits after 2, 4, 6 and 8 of 12 layers under one head, with layer dropout
and rotating exit losses (LayerSkip, arXiv:2404.16710), for early exit and self-speculative decoding.

Run:     python -m sparsejax train --config=configs/early_exit.py --workdir=runs/early_exit
         python -m sparsejax eval --workdir=runs/early_exit --exit-table=exits.npz
         python -m sparsejax generate --workdir=runs/early_exit --exit-rule=max_prob --exit-threshold=0.9 --format=json
         python -m sparsejax generate --workdir=runs/early_exit --draft-layers=2 --draft-length=4 --temperature=0
         python benchmarks/decode.py --run=runs/early_exit
Expect:  losses of the exits (`exit/02/cross_entropy`, …) that fall from exit to exit. After 600 steps
         (`--config.train.steps=600`) 2.07 bits per byte on 8 windows, and by `python benchmarks/decode.py
         --run=runs/early_exit --tokens=256 --rounds=7 --draft-lengths 2 3 4 6` drafts of 6 tokens by 4 layers decode
         1.47 [1.41, 1.60] times as fast with the same text (6.2 of 7 tokens kept: it repeats itself), and `max_prob`
         0.95 runs 10.0 of 12 layers and loses 1.9 %: no threshold up to it loses 1 % or less
"""

from sparsejax import default_config


def get_config():
    config = default_config()
    config.model.d_model, config.model.num_heads = 256, 4
    config.model.pattern, config.model.repeats = ("dense",), 12
    config.model.exits = "heads"
    config.model.exits.layers = (2, 4, 6, 8)
    config.model.exits.weights = "sum_l"
    config.model.exits.scale = 0.2
    config.model.exits.curriculum = "rotational"
    config.model.exits.curriculum.every = 2
    config.model.layer_dropout = 0.1
    config.data.sequence_length, config.data.batch_size = 256, 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule.warmup_steps = 100
    config.train.steps = 2000
    return config
