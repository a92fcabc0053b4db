"""configs/encoder_classify.py with light and heavy branches in every layer (CoLT5, arXiv:2303.09752): an eighth of the
tokens have the heavy network and heavy attention, to a quarter of them.

`:random` and `:place` choose as many by lot, and every eighth token; `:coda` has the plain layers, for an eighth of the
tokens, beside an adapter for all (CoDA, arXiv:2304.04947).

Run:     python -m sparsejax train --config=configs/light_heavy.py --workdir=runs/light_heavy --config.train.steps=60 \
             --config.eval.every=60 --config.eval.batches=16
         python -m sparsejax train --config=configs/light_heavy.py:random --workdir=runs/light_lots
Expect:  25.0 % right on 384 rows of the validation split after 60 steps, 2.25 nats, weights that add up to 9/8 · k but
         for 0.003 tokens a row (`:random` with the same flags 27.9 % and 2.20: one seed each, too few rows and steps to
         tell them apart); the 400 steps of the config have not been run to the end
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
