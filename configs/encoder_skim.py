"""configs/encoder_classify.py with tokens that leave on the way: PoWER-BERT (arXiv:2001.08950), LTP (`:ltp`,
arXiv:2107.00910), Transkimmer (`:transkimmer`, arXiv:2205.07324), or a fixed schedule as control (`:schedule`).

First the encoder, then this from its parameters: what leaves is learned softly; evaluation really drops it.

Run:     python -m sparsejax train --config=configs/encoder_classify.py --workdir=runs/encoder_classify
         python -m sparsejax train --config=configs/encoder_skim.py --init-from=runs/encoder_classify \
             --workdir=runs/encoder_skim
Expect:  34.2 % right where the encoder alone has 34.5 %, 45 % of the tokens left after every layer; the other methods
         have not been run to the end. Rows cut to 160 tokens give 33.1 %, faster (benchmarks/skim.py)
"""

import runpy
from pathlib import Path

from sparsejax import choose
from sparsejax.blocks import SKIMS


def get_config(method="power_bert"):
    config = runpy.run_path(str(Path(__file__).parent / "encoder_classify.py"))["get_config"]()
    config.model.skim = choose(SKIMS, method)
    if method == "schedule":
        config.model.skim.stage, config.model.skim.shares = "hard", (0.5, 0.4, 0.3, 0.3)
    if method == "ltp":
        config.model.skim.threshold, config.model.skim.temperature = 0.004, 5e-4
    if method == "power_bert":
        config.model.skim.coefficient = 0.3
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 100
    config.eval.every = config.checkpoint.every = 100
    return config
