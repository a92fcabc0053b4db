"""configs/encoder_classify.py with light and heavy branches in every layer (CoLT5, arXiv:2303.09752): an eighth of the
tokens have the heavy network and heavy attention, to a quarter of them.

`:random` and `:place` choose as many by lot, and every eighth token; `:coda` has the plain layers, for an eighth of the
tokens, beside an adapter for all (CoDA, arXiv:2304.04947).

Run:     python -m sparsejax train --config=configs/light_heavy.py --workdir=runs/light_heavy
         python -m sparsejax train --config=configs/light_heavy.py:random --workdir=runs/light_lots
Expect:  FIGURE 0
"""

import runpy
from pathlib import Path

from sparsejax import choose
from sparsejax.blocks import BLOCKS, SELECTIONS


def get_config(arm="learned"):
    config = runpy.run_path(str(Path(__file__).parent / "encoder_classify.py"))["get_config"]()
    model = config.model
    model.num_heads = 4
    if arm == "coda":
        model.select = choose(SELECTIONS, "coda")
    else:
        model.blocks.deep = choose(BLOCKS, "light_heavy")
        model.pattern, model.blocks.deep.by, model.blocks.deep.radius = ("deep",), arm, 16
    config.train.steps = 400
    return config
