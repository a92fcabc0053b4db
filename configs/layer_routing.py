"""D-LLM (Wang et al., NeurIPS 2024): of six layers the last four are run or skipped by every token as it needs, two of
them on average.

Run:     python -m sparsejax train --config=configs/layer_routing.py --workdir=runs/layer_routing
Expect:  3.25 bits per byte on 8 batches of the validation split at step 100, the four layers run by 45 % of the tokens
         (configs/halting.py:plain, which has six layers for all, 3.29: one seed each); in training 4.92 at step 20 and
         3.57 at 100
"""

from sparsejax import choose, default_config
from sparsejax.blocks import BLOCKS, SELECTIONS


def get_config():
    config = default_config()
    model = config.model
    model.d_model, model.num_heads = 96, 4
    model.blocks.routed = choose(BLOCKS, "dense")
    model.prefix, model.pattern, model.repeats = ("dense", "dense"), ("routed",), 4
    model.select = choose(SELECTIONS, "d_llm")
    model.select.blocks, model.select.hidden = ("routed",), 64
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 3e-3, 0.98
    config.optimizer.schedule.warmup_steps = 30
    config.train.steps = 100
    config.eval.every, config.eval.batches = 100, 8
    config.checkpoint.every = 100
    return config
