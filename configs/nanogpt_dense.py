"""nanoGPT's CPU recipe for character-level Shakespeare (github.com/karpathy/nanoGPT, README), with rotary positions
and RMSNorm.

4 layers, 4 heads, d = 128, context 64, batch 12, 2,000 steps; bytes as tokens; the first 90 % of the file trains, the
rest validates, all of it, in windows that do not overlap.

Run:     python -m sparsejax train --config=configs/nanogpt_dense.py --config.data.path=input.txt --workdir=runs/dense
Expect:  1.650 nats per byte on the whole validation split, the mean of train.seed 0, 1, 2: 1.653, 1.649, 1.647
"""

from sparsejax import default_config


def get_config():
    config = default_config()
    config.data.name, config.data.path = "text", "input.txt"
    config.data.validation_fraction = 0.1
    config.data.sequence_length, config.data.batch_size = 64, 12
    config.model.d_model, config.model.num_heads = 128, 4
    config.model.pattern, config.model.repeats = ("dense", "dense"), 2
    config.model.scan = False  # two repeats: unrolled, a step is a little faster on CPU
    config.optimizer.learning_rate, config.optimizer.b2 = 3e-3, 0.99
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.warmup_steps, config.optimizer.schedule.final_fraction = 100, 0.1
    config.train.steps, config.train.log_every = 2000, 50
    config.eval.every = config.checkpoint.every = 500
    return config
