"""Experts drawn blindly: for a whole batch in training, for a token or a document outside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.ops.assignment import by_token
from sparsejax.routers.lots import Lots, draw_lots
from sparsejax.routers.policy import Random
from sparsejax.routers.presets import thor

from support import (
    ONE_DEVICE,
    candidates,
    host_batch,
    moe_layer_params,
    moe_layer_runner,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
)

ROWS, LENGTH, EXPERTS = 4, 6, 4
BACKBONE = ModelConfig(d_model=8, num_heads=2)


def experts(selector, number, rows=ROWS, length=LENGTH, training=False, documents=2):
    """`[B, T, K]` of a batch in a layer with this number."""
    arrays = host_batch(rows, length, documents=documents, padded=0)
    with on_mesh(ONE_DEVICE) as mesh:
        lots = draw_lots(put_batch(arrays, mesh), jnp.uint32(number))
    lots = jax.tree.map(np.asarray, lots)
    pairs = selector(candidates(np.zeros((rows, length, EXPERTS)), lots=lots, training=training))
    return np.asarray(by_token(pairs.expert, pairs))


class TestDraws:
    @pytest.mark.parametrize("evaluation, documents", [("token", 1), ("document", 32)])
    def test_every_expert_has_its_part(self, evaluation, documents):
        found = experts(Random(evaluation=evaluation), 5, rows=64, length=32, documents=documents)
        shares = np.bincount(found.ravel(), minlength=EXPERTS) / found.size
        assert (np.abs(shares - 1 / EXPERTS) <= 4 * np.sqrt(3 / 16 / found.size)).all()

    def test_in_training_all_tokens_share_a_draw_and_draws_are_even(self):
        assert len(set(experts(Random(), 5, training=True).ravel().tolist())) == 1
        numbers = np.random.default_rng(0).integers(0, 2**32, (1, 4000), np.uint32)  # of as many steps
        lots = Lots(shared=numbers, document=0 * numbers, token=0 * numbers)
        pairs = Random()(candidates(np.zeros((1, 4000, EXPERTS)), lots=lots, training=True))
        shares = np.bincount(np.asarray(pairs.expert)[0], minlength=EXPERTS) / 4000
        assert (np.abs(shares - 1 / EXPERTS) <= 4 * np.sqrt(3 / 16 / 4000)).all()

    def test_outside_training_a_document_or_nobody_shares_one(self):
        arrays, by_document = host_batch(ROWS, LENGTH, padded=0), experts(Random(evaluation="document"), 5)
        for row, segments in zip(by_document, arrays["segments"], strict=True):
            for segment in set(segments.tolist()):
                assert len(set(row[segments == segment, 0].tolist())) == 1
        assert len(set(by_document.ravel().tolist())) > 1
        by_token_ = experts(Random(), 5)
        assert any(len(set(row[:3, 0].tolist())) > 1 for row in by_token_)

    def test_place_depth_and_seed_decide(self):
        same, again = experts(Random(), 5), experts(Random(), 5)
        assert np.array_equal(same, again)
        for other in (experts(Random(), 6), experts(Random(seed=1), 5)):
            assert not np.array_equal(same, other)

    def test_k_experts_are_distinct(self):
        found = experts(Random(k=3), 5)
        assert all(len(set(each)) == 3 for each in found.reshape(-1, 3).tolist())


def layer():
    """(runner, parameters, input, batch) of a layer whose capacity factor would drop most."""
    spec = MoESpec(num_experts=EXPERTS, d_ff=6, capacity_factor=0.5, eval_capacity_factor=0.5, router=thor())
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 8)).astype(np.float32)
    params = moe_layer_params(spec, BACKBONE)
    return moe_layer_runner(spec, BACKBONE, ONE_DEVICE), params, x, host_batch(ROWS, LENGTH)


class TestLayer:
    def test_one_expert_serves_the_batch_and_drops_nothing(self):
        run, params, x, arrays = layer()
        drawn = set()
        for seed in range(6):
            _, report = run(params, x, arrays, key=jax.random.key(seed))
            assert report.dropped.sum() == 0 and report.tokens == report.assigned.max() == report.assigned.sum()
            drawn.add(int(report.assigned.argmax()))
        assert len(drawn) > 1

    def test_evaluation_is_the_same_twice_and_drops_nothing(self):
        run, params, x, arrays = layer()
        (once, report), (twice, _) = (run(params, x, arrays, mode="eval") for _ in range(2))
        assert np.array_equal(once, twice)
        assert report.dropped.sum() == 0 and (report.assigned > 0).sum() > 1

    def test_only_the_drawn_expert_has_a_gradient(self):
        run, params, x, arrays = layer()
        with on_mesh(ONE_DEVICE) as mesh:
            batch, key = put_batch(arrays, mesh), jax.random.key(0)
            operands = put_rows(x, mesh), batch, key, "train"
            loss = lambda params: jnp.square(run.call(params, *operands)[0]).sum()  # noqa: E731
            grads = jax.jit(jax.grad(loss))(put_params(params, mesh))
        _, report = run(params, x, arrays, key=jax.random.key(0))
        for name in ("w_in", "w_out"):
            moved = np.abs(np.asarray(grads["experts"][name][...])).max((1, 2)) > 0
            assert np.array_equal(moved, report.assigned > 0)
