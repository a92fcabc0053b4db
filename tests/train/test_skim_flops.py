"""The work of layers whose tokens have left, against the sum written out."""

import numpy as np
import pytest

from sparsejax.base.reports import Report, SkimReport
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.skim_methods import Schedule
from sparsejax.model.config import ModelConfig
from sparsejax.model.cost import forward_flops
from sparsejax.model.heads import Classes
from sparsejax.train.metrics import spared_flops

MODEL = ModelConfig(
    d_model=8,
    num_heads=2,
    repeats=2,
    pattern=("dense",),
    blocks={"dense": DenseSpec(d_ff=20)},
    causal=False,
    head=Classes(classes=3),
    skim=Schedule(shares=(0.5, 0.25)),
)


def test_layers_are_spared_what_left():
    counts = {"tokens": [100, 100], "attended": [100, 50], "left": [50, 25], "keys": [1000.0, 250.0]}
    nothing = {name: np.zeros(2) for name in ("kept", "keep_sum", "unplaced")}
    skim = SkimReport(**{name: np.array(values) for name, values in counts.items()}, **nothing)
    whole = forward_flops(MODEL, tokens=100, keys=1000, rows=10)
    projections, scores, feed_forward = 2 * 4 * 8 * 8, 2 * 2 * 8, 2 * 2 * 8 * 20
    expected = 150 * projections + 1250 * scores + 75 * feed_forward + 10 * 2 * 8 * 3
    assert whole - spared_flops(MODEL, {"pattern_0": Report(skim=skim)}, 1000) == pytest.approx(expected)
