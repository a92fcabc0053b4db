"""The shape of OLMoE-1B-7B (arXiv:2409.02060): 16 layers, 64 small experts of which a token takes eight, on 16 chips.

Run:     python -m sparsejax plan --config=configs/pod/olmoe.py --topology=v5e:4x4
         python -m sparsejax train --config=configs/pod/olmoe.py --workdir=runs/olmoe
Expect:  6.92B parameters, 1.28B of them active, 516 TFLOP a step. Compiled for v5e:4x4: 5.8 GiB of state and 5.5 GiB of
         temporaries on a device (it has 16), 766 TFLOP with the forward pass computed again, 18.1 GiB sent in a step
"""

from sparsejax import default_config
from sparsejax.routers import presets


def get_config():
    config = default_config()
    model, moe = config.model, config.model.blocks.moe
    model.d_model, model.num_heads, model.qk_norm = 2048, 16, True
    model.vocab_size, model.tied_head = 50_304, False
    model.pattern, model.repeats = ("moe",), 16
    model.dtype, model.remat = "bfloat16", "full"
    moe.num_experts, moe.d_ff, moe.gated, moe.activation = 64, 1024, True, "silu"
    moe.dispatch, moe.buffer_factor = "grouped", 1.25
    moe.router = presets.olmoe()
    config.data.sequence_length, config.data.batch_size = 4096, 16
    config.optimizer.learning_rate, config.optimizer.schedule.warmup_steps = 4e-4, 2000
    config.mesh.data, config.mesh.expert = 4, 4
    config.train.steps = 500000
    return config
