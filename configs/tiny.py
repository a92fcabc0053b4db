"""The smallest experiment with a mixture-of-experts block, for tests and trials: the first step comes within seconds.

Run:     python -m sparsejax train --config=configs/tiny.py --workdir=runs/tiny
Expect:  about 6.4 bits per byte after its 20 steps; nothing of interest is learned.
"""

from sparsejax import default_config


def get_config():
    config = default_config()
    config.data.name = "synthetic"
    config.data.sequence_length, config.data.batch_size = 32, 8
    config.model.d_model, config.model.num_heads = 32, 4
    config.model.repeats = 1
    config.model.blocks.moe.num_experts = 8
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule.warmup_steps = 5
    config.train.steps, config.train.log_every = 20, 5
    config.eval.every = config.checkpoint.every = 10
    return config
