"""Ways to balance experts: an auxiliary loss by sequence, microbatch or step, a bias without a loss, quantiles.

Run:  python -m sparsejax ablate experiments/balance.py --workdir=runs/balance --out=experiments
"""

from pathlib import Path

import numpy as np

from sparsejax.ablate import Arm, Study, pod
from sparsejax.routers import presets

COMMON = {"train.accumulation": 4, "model.blocks.moe.group_size": 512, "eval.passages": 64}
"""Four microbatches a step, so that a microbatch and a step are not the same; 64 rows that tell what experts serve."""


def by_loss(scope: str) -> Arm:
    return Arm(argument="mixtral", edits=COMMON | {"model.blocks.moe.router.balance.scope": scope})


def specialised(run: Path) -> dict[str, float]:
    """Mutual information of a token's id and its first expert, in nats, on the passages of the last evaluation."""
    newest = max((run / "passages").glob("*.npz"), key=lambda path: int(path.stem))
    with np.load(newest) as arrays:
        real = arrays["segments"] > 0
        tokens, experts = arrays["tokens"][real], arrays["01_moe/experts"][real][:, 0]
    joint = np.histogram2d(tokens, experts, bins=(256, 16), range=((0, 256), (0, 16)))[0] / len(tokens)
    alone = joint.sum(1, keepdims=True) * joint.sum(0)
    held = joint > 0
    return {"specialisation": float((joint[held] * np.log(joint[held] / alone[held])).sum())}


def quantiles(config) -> None:
    config.model.blocks.moe.router = presets.quantile_balanced()
    config.model.blocks.moe.router.selection.k = 2


def bias_alone(config) -> None:
    config.model.blocks.moe.router.balance = "none"
    config.model.blocks.moe.router.controller = "loss_free"
    config.model.blocks.moe.router.controller.rate = 0.02


def nothing(config) -> None:
    config.model.blocks.moe.router.balance = "none"


STUDY = Study(
    question="What does balancing cost, and by which means?",
    config="configs/routing_arm.py",
    arms={
        "global": by_loss("global"),
        "microbatch": by_loss("microbatch"),
        "sequence": by_loss("sequence"),
        "loss_free": Arm(argument="mixtral", edits=COMMON, edit=bias_alone),
        "quantile": Arm(argument="mixtral", edits=COMMON, edit=quantiles),
        "none": Arm(argument="mixtral", edits=COMMON, edit=nothing),
    },
    base="global",
    scales={"pod": pod()},
    varies=("model.blocks.moe.router",),
    deviation=0.02,
    effect=0.05,
    shown=("moe/load_max_over_mean", "moe/drop_fraction", "moe/dead_experts", "moe/router_entropy"),
    figures=specialised,
    notes=(
        "All arms choose two of 16 experts (Mixtral's router) and differ in what balances them: f · P with coefficient "
        "0.01 over a step, a microbatch of 512 tokens or a sequence of 128; a bias without a loss (rate 0.02); "
        "quantiles; nothing. Load is the largest of an expert over the mean, in evaluation. *specialisation* is the "
        "mutual information of a byte and its first expert, in nats, on 64 rows of the validation split.",
    ),
)
