"""nanoGPT's CPU recipe with a Switch layer (arXiv:2101.03961) in every other place: 8 experts, one per token.

The active FLOPs, learning rate, schedule, data order and every other setting are those of `nanogpt_dense.py`.

Run:     python -m sparsejax train --config=configs/nanogpt_switch.py --config.data.path=input.txt --workdir=runs/switch
Expect:  1.639 nats per byte on the whole validation split, the mean of train.seed 0, 1, 2: 1.638, 1.635, 1.642
         (dense: 1.650 of 1.653, 1.649, 1.647)
"""

import runpy
from pathlib import Path

from sparsejax import choose
from sparsejax.routers.weights import WEIGHTS


def get_config():
    config = runpy.run_path(str(Path(__file__).with_name("nanogpt_dense.py")))["get_config"]()
    config.model.pattern = ("dense", "moe")
    moe = config.model.blocks.moe
    moe.num_experts, moe.capacity_factor = 8, 2.0
    moe.group_size = 768  # the whole step
    moe.router.selection.k, moe.router.weight = 1, choose(WEIGHTS, "raw")
    return config
