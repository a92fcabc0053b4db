"""The language model: against the slow decoder, however it is compiled, and what may see what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.blocks.context import Totals
from sparsejax.blocks.dense import DenseSpec
from sparsejax.blocks.moe import MoESpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import LanguageModel, auxiliary_losses, moe_layers
from sparsejax.ops.losses import cross_entropy_sum
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw

from reference import transformer as slow
from support import (
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    on_mesh,
    put_batch,
    put_params,
    to_numpy,
)

ROWS, LENGTH, VOCAB = 3, 8, 32
EXPERTS = 4
SWITCH = RouterConfig(selection=TopK(k=1), weight=Raw())


def model_config(router=SWITCH, capacity_factor=0.75, **fields):
    """Tiny, with drops unless told otherwise; evaluation has room for every pair."""
    moe = MoESpec(
        num_experts=EXPERTS,
        d_ff=8,
        capacity_factor=capacity_factor,
        eval_capacity_factor=float(EXPERTS),
        router=router,
    )
    shape = {"d_model": 16, "num_heads": 2, "vocab_size": VOCAB, "pattern": ("dense", "moe"), "repeats": 2}
    return ModelConfig(**(shape | {"blocks": {"dense": DenseSpec(d_ff=16), "moe": moe}} | fields))


def params_of(config, seed=0):
    return host_params(lambda key: LanguageModel(key, config), seed)


@functools.cache
def forward_of(config, mode):
    """`forward(params, fields of a batch) -> ModelOutput`, host to host, on one device."""
    with on_mesh(ONE_DEVICE):
        graph = graph_of(lambda key: LanguageModel(key, config))
    call = jax.jit(lambda params, batch: nnx.merge(graph, params)(batch, mode=mode))

    def forward(params, arrays):
        with on_mesh(ONE_DEVICE) as mesh:
            return to_numpy(call(put_params(params, mesh), put_batch(arrays, mesh)))

    return forward


def plain(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))


def blocks_of(params, config):
    """The parameters of every block from input to output, unstacked."""
    stack = params["stack"]
    units = [
        jax.tree.map(lambda leaf: leaf[r], stack["units"]["blocks"][i])
        for r in range(config.repeats if config.pattern else 0)
        for i in range(len(config.pattern))
    ]
    ends = [[stack[end][i] for i in range(len(getattr(config, end)))] for end in ("prefix", "suffix")]
    return [*ends[0], *units, *ends[1]]


class TestAgainstTheSlowDecoder:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"causal": False},
            {
                "num_heads": 4,
                "num_kv_heads": 2,
                "qk_norm": True,
                "attention_soft_cap": 2.0,
                "logit_soft_cap": 3.0,
                "tied_head": False,
                "rope_theta": 100.0,
                "prefix": ("dense",),
                "pattern": ("moe",),
                "suffix": ("gated",),
            },
        ],
        ids=["plain", "bidirectional", "with everything"],
    )
    def test_logits(self, fields):
        config = model_config()
        specs = dict(config.blocks) | {"gated": DenseSpec(d_ff=10, gated=True)}
        config = dataclasses.replace(config, blocks=specs, **fields)
        params, arrays = params_of(config), host_batch(ROWS, LENGTH, VOCAB)
        actual = forward_of(config, "train")(params, arrays)
        values = plain(params)
        moe = {"k": 1, "weight": "raw", "factor": (3, 4), "group_size": LENGTH}
        expected = slow.logits(values, blocks_of(values, config), arrays, config, moe)
        real = arrays["segments"] > 0
        assert actual.logits.dtype == np.float32
        assert_close(actual.logits[real], expected[real].astype(np.float32))
        assert all(layer.dropped.sum() > 0 for layer in moe_layers(config, actual.reports).values())


def loss_and_grads(config, params, arrays):
    """(loss, terms, reports, gradients) of a training step's loss with noise from a key."""
    with on_mesh(ONE_DEVICE) as mesh:
        graph = graph_of(lambda key: LanguageModel(key, config))

        @jax.jit
        def call(params, batch):
            def loss(params):
                out = nnx.merge(graph, params)(batch, mode="train", key=jax.random.key(1))
                real = batch.segments > 0
                totals = Totals(
                    targets=batch.loss_mask.sum(), tokens=real.sum(), rows=real.any(-1).sum(), microbatches=1
                )
                terms = auxiliary_losses(config, out.reports, totals)
                nll = cross_entropy_sum(out.logits, batch.targets, batch.loss_mask) / totals.targets
                return nll + sum(terms.values()), (terms, out.reports)

            (value, (terms, reports)), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return value, terms, reports, grads

        return to_numpy(call(put_params(params, mesh), put_batch(arrays, mesh)))


JITTERED = dataclasses.replace(SWITCH, jitter=0.2)


@pytest.fixture(scope="module")
def scanned():
    """(config, parameters, batch, results) of the model as it is by default: scanned, nothing recomputed."""
    config = model_config(JITTERED)
    params, arrays = params_of(config), host_batch(ROWS, LENGTH, VOCAB)
    return config, params, arrays, loss_and_grads(config, params, arrays)


class TestCompiledAnyWay:
    @pytest.mark.parametrize(
        "fields",
        [
            {"scan": False},
            {"remat": "full"},
            {"remat": "dots"},
            {"remat": "names", "remat_names": ("attention", "experts")},
            pytest.param({"remat": "full", "scan": False}, marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_loss_gradients_and_ledger_are_the_same(self, scanned, fields):
        config, params, arrays, expected = scanned
        assert_close(loss_and_grads(dataclasses.replace(config, **fields), params, arrays), expected)

    def test_there_are_drops_and_gradients_to_compare(self, scanned):
        config, _, _, (_, terms, reports, grads) = scanned
        layers = moe_layers(config, reports)
        assert list(layers) == ["01_moe", "03_moe"]
        assert all(layer.dropped.sum() > 0 for layer in layers.values())
        assert not np.array_equal(layers["01_moe"].assigned, layers["03_moe"].assigned)
        assert set(terms) == {"balance", "router_z"}
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))

    def test_losses_are_summed_over_layers(self, scanned):
        config, _, arrays, (_, terms, reports, _) = scanned
        tokens = (arrays["segments"] > 0).sum()
        z = sum(0.001 * layer.z_sum / tokens for layer in moe_layers(config, reports).values())
        balance = sum(0.01 * layer.balance_sum for layer in moe_layers(config, reports).values())
        np.testing.assert_allclose((terms["router_z"], terms["balance"]), (z, balance), rtol=1e-5)

    def test_the_pattern_may_as_well_be_a_prefix_or_a_suffix(self, scanned):
        """The same blocks, listed one by one: same values, and the same noise, for a layer's key goes by its depth."""
        config, params, arrays, expected = scanned
        listed = dataclasses.replace(config, prefix=("dense", "moe", "dense"), pattern=(), suffix=("moe",))
        placed = params_of(listed)
        blocks = blocks_of(params, config)
        for end, some in (("prefix", blocks[:3]), ("suffix", blocks[3:])):
            for i, block in enumerate(some):
                placed["stack"][end][i] = block
        for name in ("embedding", "final_norm"):
            placed[name] = params[name]
        loss, terms, reports, grads = loss_and_grads(listed, placed, arrays)
        assert_close((loss, terms), expected[:2])
        assert_close(moe_layers(listed, reports), moe_layers(config, expected[2]))
        assert_close(list(map(plain, blocks_of(grads, listed))), list(map(plain, blocks_of(expected[3], config))))


def changed(arrays, where):
    """The batch with other tokens at the positions `where` of row 0."""
    tokens = arrays["tokens"].copy()
    tokens[0, where] = (tokens[0, where] + 7) % VOCAB
    return arrays | {"tokens": tokens}


TOP_2 = RouterConfig()


class TestWhatSeesWhat:
    @pytest.mark.parametrize(
        "config, mode",
        [(model_config(), "train"), (model_config(TOP_2), "eval")],
        ids=["k=1 with drops", "k=2 with room for all"],
    )
    def test_no_token_sees_a_later_one(self, config, mode):
        params, arrays = params_of(config), host_batch(ROWS, LENGTH, VOCAB, documents=1)
        forward = forward_of(config, mode)
        before = forward(params, arrays)
        if mode == "train":
            assert all(layer.dropped.sum() > 0 for layer in moe_layers(config, before.reports).values())
        for first in range(1, LENGTH):
            after = forward(params, changed(arrays, slice(first, None)))
            assert np.array_equal(after.logits[0, :first], before.logits[0, :first])
            assert (after.logits[0, first] != before.logits[0, first]).any()
            assert np.array_equal(after.logits[1:], before.logits[1:]), "rows are routed apart"

    def test_choice_major_slots_with_drops_let_a_token_see_a_later_one(self):
        """Documented leak: for k > 1 a later token's first choice goes before an earlier token's second."""
        config = model_config(TOP_2, capacity_factor=0.75)
        params, arrays = params_of(config), host_batch(ROWS, LENGTH, VOCAB, documents=1)
        forward = forward_of(config, "train")
        before = forward(params, arrays).logits[0]
        leaks = [
            np.abs(forward(params, changed(arrays, slice(first, None))).logits[0, :first] - before[:first]).max() > 1e-6
            for first in range(1, LENGTH)
        ]
        assert any(leaks)

    def test_documents_of_a_row_do_not_see_each_other(self):
        config = model_config(TOP_2)
        params, arrays = params_of(config), host_batch(ROWS, LENGTH, VOCAB, documents=2)
        forward = forward_of(config, "eval")
        before, second = forward(params, arrays).logits[0], LENGTH // 2
        after = forward(params, changed(arrays, slice(0, second))).logits[0]
        assert np.array_equal(after[second:], before[second:])
        assert (after[:second] != before[:second]).any()

    def test_a_packed_document_is_what_it_is_alone(self):
        config, second = model_config(TOP_2), LENGTH // 2
        params, arrays = params_of(config), host_batch(ROWS, LENGTH, VOCAB, documents=2)
        alone = {k: np.pad(a[:, second:], ((0, 0), (0, second))) if a.ndim == 2 else a for k, a in arrays.items()}
        forward = forward_of(config, "eval")
        packed, single = forward(params, arrays).logits[:-1, second:], forward(params, alone).logits[:-1, :second]
        assert_close(single, packed, 1e-6)


class TestShapes:
    """By `jax.eval_shape`: nothing is computed."""

    def outputs(self, config):
        with on_mesh(ONE_DEVICE) as mesh:

            def run(key, batch):
                model = LanguageModel(key, config)
                return nnx.split(model)[1], model(batch, mode="train", key=key)

            return jax.eval_shape(run, jax.random.key(0), put_batch(host_batch(ROWS, LENGTH, VOCAB), mesh))

    def test_bfloat16_keeps_parameters_logits_and_reports_in_float32(self):
        params, out = self.outputs(model_config(dtype="bfloat16"))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        assert out.logits.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(out.reports)} == {jnp.dtype("float32"), jnp.dtype("int32")}

    def test_an_untied_head_is_one_more_matrix(self):
        tied, untied = (self.outputs(model_config(tied_head=tied))[0] for tied in (True, False))
        count = lambda params: sum(leaf.size for leaf in jax.tree.leaves(params))  # noqa: E731
        assert count(untied) - count(tied) == 16 * VOCAB

    def test_reports_are_stacked_over_repeats_and_only_there(self):
        _, out = self.outputs(model_config(prefix=("moe",), pattern=("dense", "moe"), repeats=3))
        shapes = {where: report.moe and report.moe.assigned.shape for where, report in out.reports.items()}
        assert shapes == {"prefix_0": (EXPERTS,), "pattern_0": None, "pattern_1": (3, EXPERTS)}

    def test_no_repeats_is_no_pattern(self):
        _, out = self.outputs(model_config(prefix=("dense",), repeats=0))
        assert set(out.reports) == {"prefix_0"}
