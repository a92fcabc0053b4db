"""One arm of the study of token selection and skimming (`experiments/tokens.py`): the task of
configs/encoder_classify.py.

`full` computes every token in four layers; `depth_2` has two layers; `select` and `select_random` run every second
layer on a quarter of the tokens, chosen by a router or by lot. In the others tokens leave for good: by what is learned
(`ltp`, `transkimmer`, `power_bert`), by a set schedule (`fixed`: those who receive least attention, `random`: by lot),
or by joining another (`merge`). These and `full` go on from `begun`: its 100 steps and 100 more at a lower rate are as
many as the others' 200.

Run:     python -m sparsejax train --config=configs/tokens_arm.py:depth_2 --workdir=runs/depth_2
Expect:  the share of the 12 classes that experiments/tokens.md says is right, by arm
"""

import runpy
from pathlib import Path

from sparsejax import choose
from sparsejax.blocks import BLOCKS, SELECTIONS, SKIMS

LEARNED = ("ltp", "transkimmer", "power_bert")
SKIMMED = {name: name for name in LEARNED} | {"fixed": "schedule", "random": "schedule", "merge": "tome"}
BEGIN = "begun"
CONTINUED = ("full", *SKIMMED)
ARMS = (BEGIN, "full", "depth_2", "select", "select_random", *SKIMMED)


def get_config(arm: str = "full"):
    config = runpy.run_path(str(Path(__file__).parent / "encoder_classify.py"))["get_config"]()
    model = config.model
    if arm == "depth_2":
        model.repeats = 2
    if arm in ("select", "select_random"):
        model.blocks.deep = choose(BLOCKS, "dense")
        model.pattern, model.repeats = ("dense", "deep"), 2
        model.select = choose(SELECTIONS, "mixture_of_depths" if arm == "select" else "random")
        model.select.capacity, model.select.blocks = 0.25, ("deep",)
        if arm == "select":
            model.select.serving = "top_k"
    if arm in SKIMMED:
        model.skim = choose(SKIMS, SKIMMED[arm])
    if arm in ("fixed", "random"):
        model.skim.stage, model.skim.shares = "hard", (0.5, 0.4, 0.3, 0.3)
        model.skim.by = {"fixed": "attention", "random": "random"}[arm]
    if arm == "ltp":
        model.skim.threshold, model.skim.temperature = 0.004, 5e-4
    if arm == "power_bert":
        model.skim.coefficient = 0.3
    config.optimizer.schedule.warmup_steps = 20
    config.train.steps = 200
    if arm == BEGIN:
        config.train.steps = 100
    if arm in CONTINUED:
        config.optimizer.learning_rate = 1e-3
        config.train.steps = 100
    config.eval.every = config.checkpoint.every = config.train.steps
    return config
