"""One arm of the study of early exit and Mixture-of-Depths on decoders (`experiments/exits.py`): six layers, bytes.

`full` computes all layers for every token, `depth_N` has N of them. `exits` has exits after 1, 2, 3 and 4 layers, under
one head, all of which are trained in every step (LayerSkip's weights, arXiv:2404.16710). `depths` runs every second
layer on a quarter of the tokens (Mixture-of-Depths, arXiv:2404.02258), `depths_random` draws them by lot.

Run:     python -m sparsejax train --config=configs/exits_arm.py:exits --workdir=runs/exits
Expect:  what experiments/exits.md says after 600 steps, by arm
"""

from sparsejax import choose, default_config
from sparsejax.blocks import BLOCKS, SELECTIONS

LAYERS = 6
EXITS = (1, 2, 3, 4)
ARMS = ("full", *(f"depth_{layers}" for layers in EXITS), "exits", "depths", "depths_random")


def get_config(arm: str = "exits"):
    config = default_config()
    model = config.model
    model.d_model, model.num_heads = 96, 4
    model.pattern, model.repeats, model.scan = ("dense",), LAYERS, False
    if arm.startswith("depth_"):
        model.repeats = int(arm.removeprefix("depth_"))
    if arm == "exits":
        model.exits = "heads"
        model.exits.layers, model.exits.weights, model.exits.scale = EXITS, "sum_l", 0.2
    if arm.startswith("depths"):
        model.blocks.deep = choose(BLOCKS, "dense")
        model.pattern, model.repeats = ("dense", "deep"), LAYERS // 2
        model.select = choose(SELECTIONS, "mixture_of_depths" if arm == "depths" else "random")
        model.select.capacity, model.select.blocks = 0.25, ("deep",)
    config.data.sequence_length, config.data.batch_size = 128, 16
    config.optimizer.learning_rate, config.optimizer.b2 = 5e-3, 0.98
    config.optimizer.schedule.warmup_steps = 50
    config.train.steps = 600
    config.eval.every, config.eval.batches = 600, 32
    config.checkpoint.every = 600
    return config
