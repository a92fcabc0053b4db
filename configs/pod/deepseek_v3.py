"""The shape of DeepSeek-V3 (arXiv:2412.19437) with grouped-query in place of latent attention: 61 layers, 256 experts
of which a token takes eight, one shared, on 1024 chips.

Run:     python -m sparsejax plan --config=configs/pod/deepseek_v3.py --topology=v5p:8x8x16
         python -m sparsejax train --config=configs/pod/deepseek_v3.py --workdir=runs/deepseek
Expect:  676B parameters, 42.3B of them active; by mesh 16×64×1 a device holds 22.4 GiB of state; a step is 2.29 EFLOP
"""

from sparsejax import default_config
from sparsejax.routers import presets


def get_config():
    config = default_config()
    model, moe = config.model, config.model.blocks.moe
    model.d_model, model.num_heads, model.num_kv_heads = 7168, 128, 16
    model.head_dim, model.vocab_size, model.tied_head = 128, 129_280, False
    model.prefix, model.pattern, model.repeats = ("dense",) * 3, ("moe",), 58
    model.dtype, model.remat = "bfloat16", "full"
    model.blocks.dense.d_ff, model.blocks.dense.gated, model.blocks.dense.activation = 18_432, True, "silu"
    moe.num_experts, moe.d_ff, moe.gated, moe.activation, moe.shared_experts = 256, 2048, True, "silu", 1
    moe.dispatch, moe.buffer_factor = "grouped", 1.25
    moe.router = presets.deepseek_v3()
    config.data.sequence_length, config.data.batch_size = 4096, 2048
    config.optimizer.learning_rate, config.optimizer.schedule.warmup_steps = 2.2e-4, 2000
    config.mesh.data, config.mesh.expert = 16, 64
    config.train.steps = 500000
    return config
