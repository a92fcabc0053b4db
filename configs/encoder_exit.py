"""configs/encoder_classify.py with twelve layers and an exit after every second one, trained by weights that rise with
depth (PABEE, arXiv:2006.04152), so that rows leave the model when it has made up its mind.

Run:     python -m sparsejax train --config=configs/encoder_exit.py --workdir=runs/encoder_exit
         python -m sparsejax eval --workdir=runs/encoder_exit --exit-rule=patience --exit-threshold=2
         python -m sparsejax eval --workdir=runs/encoder_exit --exit-rule=entropy --exit-threshold=1.5
         python benchmarks/encoder_exit.py --run=runs/encoder_exit
Expect:  after 200 of the 600 steps every exit is right on 26 to 29 % of the validation split (chance: 8.3 %), the first
         no less often than the last; all 600 have not been run
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(str(Path(__file__).parent / "encoder_classify.py"))["get_config"]()
    config.model.repeats = 12
    config.model.exits = "heads"
    config.model.exits.layers = (2, 4, 6, 8, 10)
    config.model.exits.head = "own"
    config.data.batch_size = 32
    config.optimizer.learning_rate = 2e-3
    config.train.steps = 600
    return config
