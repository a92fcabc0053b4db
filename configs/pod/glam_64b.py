"""The shape of GLaM 64B/64E (arXiv:2112.06905): 64 layers, every other one with 64 experts of which a token takes two,
1.2T parameters on 1024 chips.

Run:     python -m sparsejax plan --config=configs/pod/glam_64b.py --topology=v5p:8x8x16
         python -m sparsejax train --config=configs/pod/glam_64b.py --workdir=runs/glam
Expect:  1.16T parameters, 96.6B of them active; by mesh 16×64×1 a device holds 55.5 GiB of state; a step is 615 PFLOP
"""

from sparsejax import default_config
from sparsejax.routers import presets


def get_config():
    config = default_config()
    model, moe = config.model, config.model.blocks.moe
    model.d_model, model.num_heads = 8192, 128
    model.head_dim, model.vocab_size = 128, 256_000
    model.pattern, model.repeats = ("dense", "moe"), 32
    model.dtype, model.remat = "bfloat16", "full"
    model.blocks.dense.d_ff, model.blocks.dense.gated = 32_768, True
    moe.num_experts, moe.d_ff, moe.capacity_factor = 64, 32_768, 1.25
    moe.router = presets.gshard()
    config.data.sequence_length, config.data.batch_size = 1024, 1024
    config.optimizer.learning_rate, config.optimizer.schedule.warmup_steps = 1e-4, 2000
    config.mesh.data, config.mesh.expert = 16, 64
    config.train.steps = 500000
    return config
