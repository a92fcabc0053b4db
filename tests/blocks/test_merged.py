"""Merged experts against the segment-by-segment reference; at one-hot decisions, over segments, padding and meshes; and
what a token may see."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.base.reports import Report
from sparsejax.blocks import presets
from sparsejax.blocks.context import Context
from sparsejax.blocks.merged import MergedLayer, MergedSpec
from sparsejax.model.config import ModelConfig
from sparsejax.model.lm import init_caches

from reference import merged as slow
from reference.moe import feed_forward
from support import (
    MESHES,
    ONE_DEVICE,
    assert_close,
    graph_of,
    host_batch,
    host_params,
    layer_runner,
    mesh_name,
    on_mesh,
    put_batch,
    put_params,
    put_rows,
    to_numpy,
)

ROWS, LENGTH, SEGMENT, WIDTH, EXPERTS = 8, 7, 3, 8, 4
BACKBONE = ModelConfig(d_model=WIDTH, num_heads=2)
UNIFORM = MergedSpec(num_experts=EXPERTS, d_ff=6, segment_length=SEGMENT)
KINDS = {
    "smear": dataclasses.replace(UNIFORM, segment_length=None),
    "lory": dataclasses.replace(UNIFORM, first_segment="own"),
    "lory, uniform first": UNIFORM,
}
ARRAYS = host_batch(ROWS, LENGTH, padded=4)  # of the last row: its last segment and all but the first of the one before
MASK = ARRAYS["segments"] > 0


@functools.cache
def params():
    """With decisions that are far from even."""
    found = host_params(lambda key: MergedLayer(key, BACKBONE, UNIFORM))
    found["router"] = found["router"].replace(6 * found["router"][...])
    return found


def tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def run(spec, x, arrays=ARRAYS, shape=ONE_DEVICE, mode="train", variables=None):
    runner = layer_runner(MergedLayer, spec, BACKBONE, shape)
    return runner(params() if variables is None else variables, x, arrays, mode=mode)


def experts():
    return tuple(params()["experts"][name][...] for name in ("w_in", "w_out"))


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_reference(name):
    spec, x = KINDS[name], tokens()
    y, report = run(spec, x)
    weights = (params()["router"][...], *experts(), spec.segment_length, spec.first_segment)
    rows = [slow.forward(x[b], MASK[b], *weights) for b in range(ROWS)]
    assert_close(y, np.stack([row[0] for row in rows]).astype(np.float32))
    size = spec.segment_length or LENGTH
    by_token = [[row[1][t // size] for t in range(LENGTH)] for row in rows]
    np.testing.assert_allclose(report.probability_sum, np.array(by_token)[MASK].sum(0), rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_ledger_counts_decisions_about_tokens(name):
    spec = KINDS[name]
    _, report = run(spec, tokens())
    segments = 1 if spec.segment_length is None else 3
    decisions = ROWS * segments - (0 if segments == 1 else 2)  # the last row has three tokens
    assert report.assigned.tolist() == report.processed.tolist() == [decisions] * EXPERTS
    assert report.slots == ROWS * segments * EXPERTS and report.dropped.sum() == report.unserved == 0
    metrics = spec.metrics(Report(moe=report), "train")
    assert metrics["moe/load_max_over_mean"] == metrics["moe/balance_loss"] == 1


def test_a_decision_for_one_expert_is_that_expert():
    x = tokens()
    x[..., 0] = 1.0
    matrix = np.zeros((WIDTH, EXPERTS), np.float32)
    matrix[0, 2] = 200.0
    variables = jax.tree.map(lambda leaf: leaf, params())
    variables["router"] = variables["router"].replace(matrix)
    y, _ = run(KINDS["smear"], x, variables=variables)
    w_in, w_out = experts()
    alone = feed_forward(x.astype(np.float64), w_in[2], w_out[2]) * MASK[..., None]
    assert_close(y, alone.astype(np.float32))


def test_padding_reaches_nothing():
    x = tokens()
    for spec in (KINDS["smear"], KINDS["lory"]):
        plain = run(spec, x)
        assert_close(run(spec, np.where(MASK[..., None], x, 9.0).astype(np.float32)), plain, 1e-6)
        assert (plain[0][~MASK] == 0).all()


def changes(spec, at):
    """By position, whether the output moves when the tokens from `at` on are others."""
    whole, x, later = host_batch(ROWS, LENGTH, padded=0), tokens(), tokens(2)
    later[:, :at] = x[:, :at]
    return (np.abs(run(spec, later, whole)[0] - run(spec, x, whole)[0]).max((0, 2)) > 0).tolist()


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
def test_what_a_token_sees(at):
    """Nothing later with a uniform first segment; with the paper's, nothing of later segments; without segments,
    everything."""
    later = [position >= at for position in range(LENGTH)]
    assert changes(UNIFORM, at) == later
    first = [position < SEGMENT and at < SEGMENT for position in range(LENGTH)]
    assert changes(KINDS["lory"], at) == [a or b for a, b in zip(later, first, strict=True)]
    assert changes(KINDS["smear"], at) == [True] * LENGTH


@pytest.mark.parametrize("name", ["smear", "lory"])
def test_a_language_model_has_to_allow_the_leak(name):
    model = {"d_model": WIDTH, "num_heads": 2, "pattern": ("merged",)}
    with pytest.raises(ConfigError, match=r"later ones helped to choose.*allow_leak=true accepts that") as error:
        ModelConfig(**model, blocks={"merged": KINDS[name]})
    assert error.value.key == "blocks.merged.allow_leak"
    for accepted in (UNIFORM, presets.smear(), presets.lory()):
        assert ModelConfig(**model, blocks={"merged": accepted}).num_layers == 2


@pytest.mark.parametrize("name", KINDS)
def test_generation_is_refused_for_a_token_alone_would_have_another_network(name):
    spec = dataclasses.replace(KINDS[name], allow_leak=True)
    config = ModelConfig(d_model=WIDTH, num_heads=2, pattern=("merged",), blocks={"merged": spec})
    with pytest.raises(ConfigError, match="generation lacks; such a model can be trained and evaluated") as error:
        init_caches(config, 2, 6)
    assert error.value.key == "model.blocks.merged.name"


@functools.cache
def with_gradients(name, shape):
    """(y, report, gradients in variables and input)."""
    with on_mesh(shape) as mesh:
        graph = graph_of(lambda key: MergedLayer(key, BACKBONE, KINDS[name]))

        @jax.jit
        def value_and_grads(params, x, direction, batch):
            def loss(params, x):
                y, report = nnx.merge(graph, params)(x, Context(batch=batch, mode="train"))
                return (y * direction).sum(), (y, report)

            grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
            return *out, grads

        rows = put_rows(tokens(), mesh), put_rows(tokens(1), mesh), put_batch(ARRAYS, mesh)
        return to_numpy(value_and_grads(put_params(params(), mesh), *rows))


SHAPES = [pytest.param(m, id=mesh_name(m), marks=[] if m == (2, 2, 2) else [pytest.mark.slow]) for m in MESHES[1:]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["smear", "lory"])
def test_the_numbers_are_those_of_one_device(name, shape):
    assert_close(with_gradients(name, shape), with_gradients(name, ONE_DEVICE))


def test_the_router_learns_from_the_task_but_not_from_the_leak():
    """A row of one segment that decides for itself gives the router no gradient in Lory, and one in SMEAR."""
    assert np.abs(with_gradients("lory", ONE_DEVICE)[2][0]["router"][...]).max() > 1e-4
    found = {}
    for name in ("smear", "lory"):
        spec = dataclasses.replace(KINDS[name], segment_length=KINDS[name].segment_length and LENGTH)
        with on_mesh(ONE_DEVICE) as mesh:
            graph = graph_of(lambda key, spec=spec: MergedLayer(key, BACKBONE, spec))

            def loss(params, x, batch, graph=graph):
                y, _ = nnx.merge(graph, params)(x, Context(batch=batch, mode="train"))
                return (y * tokens(1)).sum()

            operands = put_params(params(), mesh), put_rows(tokens(), mesh), put_batch(ARRAYS, mesh)
            grads = jax.jit(jax.grad(loss))(*operands)
            found[name] = np.abs(grads["router"][...]).max()
    assert found["smear"] > 1e-4 and found["lory"] == 0


@pytest.mark.parametrize("field", ["num_experts", "d_ff", "segment_length"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ConfigError, match="0 is not positive") as error:
        MergedSpec(**{field: 0})
    assert error.value.key == field


def test_a_decision_costs_a_merge_and_a_token_one_network():
    weights, matrix = 2 * WIDTH * 6, WIDTH * EXPERTS
    decision = 2 * (EXPERTS * weights + matrix)
    smear, lory = (KINDS[name].costs(BACKBONE) for name in ("smear", "lory"))
    assert smear["mlp"].per_token == lory["mlp"].per_token == 2 * weights
    assert smear["experts"].per_row + smear["router"].per_row == decision
    assert lory["experts"].routed == 2 * EXPERTS * weights / SEGMENT
    _, report = run(KINDS["smear"], tokens())
    assert KINDS["smear"].processed_flops(Report(moe=report), BACKBONE) == ROWS * decision
