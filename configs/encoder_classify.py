"""Which package of the Python standard library a snippet of 255 bytes comes from: 12 classes, all as frequent.

An encoder with attention in both directions and the mean of its tokens before the head. Files are split, so that no
file of the validation split is seen in training.

Run:     python -m sparsejax train --config=configs/encoder_classify.py --workdir=runs/encoder_classify
Expect:  34.5 % right on the validation split (chance: 8.3 %) after 400 steps, 62 % of the last training batch
"""

from sparsejax import choose, default_config
from sparsejax.data.tasks import TASKS
from sparsejax.model.heads import HEADS


def get_config():
    config = default_config()
    model = config.model
    model.d_model, model.num_heads = 64, 2
    model.pattern, model.repeats = ("dense",), 4
    model.causal = False
    model.vocab_size = 260  # the bytes, the mask of configs/encoder_masked.py, the class token
    model.head = choose(HEADS, "classes")
    config.data.task = choose(TASKS, "classify")
    config.data.sequence_length, config.data.batch_size = 256, 24
    config.optimizer.learning_rate, config.optimizer.b2 = 3e-3, 0.98
    config.optimizer.schedule.warmup_steps = 50
    config.train.steps = 400
    config.eval.every = 200
    config.checkpoint.every = 200
    return config
