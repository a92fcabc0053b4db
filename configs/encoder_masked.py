"""A BERT-style encoder (arXiv:1810.04805): masked bytes of the Python standard library, attention in both directions.

15 % of the tokens are to be predicted, of which 80 % are masked, 10 % are another byte and 10 % are as they were.

Run:     python -m sparsejax train --config=configs/encoder_masked.py --workdir=runs/encoder_masked
Expect:  45.9 % of the hidden bytes right and 2.13 nats each, on 32 batches of the validation split after 200 steps
"""

from sparsejax import choose, default_config
from sparsejax.data.tasks import TASKS


def get_config():
    config = default_config()
    model = config.model
    model.d_model, model.num_heads = 64, 2
    model.pattern, model.repeats = ("dense",), 4
    model.causal = False
    model.vocab_size = 260  # the bytes, the mask, the class token of configs/encoder_classify.py
    config.data.task = choose(TASKS, "masked")
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 30
    config.train.steps = 200
    config.eval.every, config.eval.batches = 200, 32
    config.checkpoint.every = 200
    return config
