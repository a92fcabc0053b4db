"""One arm of the study of AltUp (`experiments/altup.py`): a small model with K streams, or a wider one.

`dense_64` is the plain model of width 64, `altup_K` and `recycled_K` it with K streams (arXiv:2301.13310), and
`dense_72` … plain models of another width, with feed-forward networks of four times it: what AltUp has to be compared
with, by FLOPs or by the time of a step.

Run:     python -m sparsejax train --config=configs/altup_arm.py:recycled_2 --workdir=runs/recycled_2
Expect:  2.2 to 2.4 bits per byte after 450 steps, by arm as in experiments/altup.md
"""

from sparsejax import default_config
from sparsejax.blocks.altup import AltUp

WIDTHS = (64, 72, 80, 96)
STREAMS = (2, 4)
ARMS = (*(f"dense_{d}" for d in WIDTHS), *(f"{kind}_{k}" for kind in ("altup", "recycled") for k in STREAMS))


def get_config(arm: str = "recycled_2"):
    config = default_config()
    model = config.model
    kind, number = arm.split("_")
    model.d_model, model.num_heads = int(number) if kind == "dense" else 64, 4
    model.pattern, model.repeats, model.scan = ("dense",), 4, False
    if kind == "altup":
        model.streams = AltUp(streams=int(number), embedding="wide", collapse="concatenate")
    if kind == "recycled":
        model.streams = AltUp(streams=int(number))
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 50
    config.train.steps, config.train.log_every = 450, 50
    config.eval.every, config.eval.batches = 450, 64
    config.checkpoint.every = 450
    return config
