"""The size of Switch-C (arXiv:2101.03961): 2048 experts in every layer, 1.6T parameters, a token takes one, on 1024
chips.

Run:     python -m sparsejax plan --config=configs/pod/switch_c.py --topology=v5p:8x8x16
         python -m sparsejax train --config=configs/pod/switch_c.py --workdir=runs/switch_c
Expect:  1.57T parameters, 1.47B of them active; by mesh 8×128×1 a device holds 18.1 GiB of state; a step is 309 PFLOP
"""

from sparsejax import default_config
from sparsejax.routers import presets


def get_config():
    config = default_config()
    model, moe = config.model, config.model.blocks.moe
    model.d_model, model.num_heads, model.head_dim = 2080, 32, 64
    model.vocab_size = 32_128
    model.pattern, model.repeats = ("moe",), 30
    model.dtype, model.remat = "bfloat16", "full"
    moe.num_experts, moe.d_ff, moe.activation = 2048, 6144, "relu"
    moe.capacity_factor, moe.group_size = 1.25, 32_768
    moe.router = presets.switch()
    config.data.sequence_length, config.data.batch_size = 1024, 32768
    config.optimizer.learning_rate, config.optimizer.schedule.warmup_steps = 1e-4, 2000
    config.mesh.data, config.mesh.expert = 8, 128
    config.train.steps = 500000
    return config
