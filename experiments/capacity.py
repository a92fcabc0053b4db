"""Capacity factor in training and in evaluation, for one and for two experts a token.

Run:  python -m sparsejax ablate experiments/capacity.py --workdir=runs/capacity --out=experiments
"""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sparsejax.ablate import Arm, Study, pod
from sparsejax.base.config import load
from sparsejax.base.sharding import make_mesh
from sparsejax.data.corpus import open_corpus
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.evaluate import Evaluator
from sparsejax.train.restore import restore_variables

FACTORS = (0.75, 1.0, 1.25, 2.0)
MOE = "model.blocks.moe."
KEYS = tuple(MOE + key for key in ("num_experts", "d_ff", "router.selection.k"))
KEY = f"{MOE}capacity_factor"


def two_of_half(config: ConfigDict) -> None:
    """Twice as many experts of half the width, of which a token takes two."""
    moe = config.model.blocks.moe
    moe.num_experts, moe.d_ff, moe.router.selection.k = 16, 2 * config.model.get_ref("d_model"), 2


def evaluated(run: Path) -> dict[str, float]:
    """Bits per byte with other capacity factors in evaluation, and what was dropped with the smallest."""
    config = load(ExperimentConfig, str(run / "config.json")).config
    mesh, corpus, found = make_mesh(config.mesh), open_corpus(config.data), {}
    with jax.set_mesh(mesh):
        variables = restore_variables(config, run, mesh)[0]
        for factor in FACTORS:
            moe = dataclasses.replace(config.model.blocks["moe"], eval_capacity_factor=factor)
            model = dataclasses.replace(config.model, blocks={**config.model.blocks, "moe": moe})
            other = dataclasses.replace(config, model=model)
            row = Evaluator(other, corpus, mesh)(variables).row
            found[f"evaluated at {factor:g}"] = row["bits_per_byte"]
            if factor == 1.0:
                found["dropped at 1"] = row["moe/drop_fraction"]
    return found


STUDY = Study(
    question="How much capacity do experts need, in training and in evaluation?",
    config="configs/routing_arm.py",
    arms={
        f"{k}-c{factor:g}": Arm(argument="switch", edit=edit, edits={KEY: factor})
        for k, edit in {"k1": None, "k2": two_of_half}.items()
        for factor in FACTORS
    },
    base="k1-c1.25",
    varies=(KEY, *KEYS),
    scales={"pod": pod()},
    deviation=0.03,
    effect=0.05,
    shown=("train/moe/drop_fraction",),
    figures=evaluated,
    notes=(
        "One of 8 experts or two of 16 of half the width, so that FLOPs are equal, by Switch's router, with "
        "so many slots in training as a multiple of an even load. The metric has twice the slots of an even load in "
        "evaluation; the columns behind it have fewer or as many, in the same trained model.",
    ),
)
