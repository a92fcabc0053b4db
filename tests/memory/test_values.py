"""Contents and consumptions against their slow references, and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.base.errors import ConfigError
from sparsejax.memory.address import Inputs
from sparsejax.memory.config import MemorySpec
from sparsejax.memory.consume import Surroundings
from sparsejax.memory.consumes import Add, Expert
from sparsejax.memory.contents import CONTENTS, GateRow, KeyValues, PartialExpert, Vector
from sparsejax.memory.gates import GatedAdd, PerLayer
from sparsejax.memory.learned import Softmax
from sparsejax.memory.projections import Concat, GatedOutput, Project, UpProjection

from lookups import BACKBONE, WIDTH, variants
from reference import memory as slow
from support import ONE_DEVICE, assert_close, host_batch, on_mesh, put_params, to_numpy

BATCH = host_batch(2, 9, documents=2, padded=2)
SEGMENTS, REAL = BATCH["segments"], BATCH["segments"] > 0
RNG = np.random.default_rng(0)
X, H, EMBEDDED = (RNG.normal(size=(*REAL.shape, WIDTH)).astype(np.float32) for _ in range(3))
WEIGHTS = RNG.uniform(0.2, 1.0, size=(*REAL.shape, 3)).astype(np.float32)


def rows_of(content):
    return np.random.default_rng(1).normal(size=(*REAL.shape, 3, content.width(BACKBONE))).astype(np.float32)


@pytest.mark.parametrize(
    "content,of_token",
    [
        (Vector(), functools.partial(slow.vector, join="sum")),
        (Vector(size=5, join="concat"), functools.partial(slow.vector, join="concat")),
        (PartialExpert(rank=1), functools.partial(slow.partial_expert, rank=1)),
        (PartialExpert(rank=3), functools.partial(slow.partial_expert, rank=3)),
        (GateRow(d_ff=12), functools.partial(slow.vector, join="sum")),
        (KeyValues(pairs=2), functools.partial(slow.key_values, pairs=2)),
        (KeyValues(pairs=2, over="token"), functools.partial(slow.key_values_together, pairs=2)),
    ],
)
def test_a_value_is_that_of_its_equation(content, of_token):
    rows = rows_of(content)
    value = np.asarray(content.value(jnp.asarray(H), jnp.asarray(rows), jnp.asarray(WEIGHTS)))
    assert value.shape[-1] == content.value_width(BACKBONE, 3)
    wanted = np.stack([[of_token(H[b, t], rows[b, t], WEIGHTS[b, t]) for t in range(9)] for b in range(2)])
    assert_close(value, wanted.astype(np.float32))


def test_pairs_of_rows_that_are_not_there_count_for_nothing():
    """However far below theirs the scores of the others are; and a token without rows has no value and no gradient."""
    content, rows = KeyValues(pairs=2, over="token"), rows_of(KeyValues(pairs=2))
    rows[..., :1, :] *= -20
    weights = np.ones_like(WEIGHTS)
    weights[..., 1:] = 0
    weights[0, 0] = 0
    rows = np.where(weights[..., None] > 0, rows, 0)
    value = lambda h, rows: content.value(h, rows, jnp.asarray(weights))  # noqa: E731
    alone = KeyValues(pairs=2).value(jnp.asarray(H), jnp.asarray(rows), jnp.asarray(weights))
    np.testing.assert_allclose(value(jnp.asarray(H), jnp.asarray(rows)), alone, rtol=1e-4, atol=1e-5)
    gradients = jax.grad(lambda *given: value(*given).sum(), (0, 1))(jnp.asarray(H), jnp.asarray(rows))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][0, 0].any() and not gradients[1][0, 0].any() and gradients[1][0, 1].any()


@pytest.mark.parametrize("name", variants(CONTENTS))
def test_rows_of_zeros_have_no_value(name):
    content = variants(CONTENTS)[name]
    assert not content.value(jnp.asarray(H), jnp.zeros_like(rows_of(content)), jnp.asarray(WEIGHTS)).any()
    zero, random = content.parts(BACKBONE, zero=True), content.parts(BACKBONE, zero=False)
    assert [part.width for part in zero] == [part.width for part in random]
    assert zero[-1].stddev == 0 < random[-1].stddev


def consumed(consume, value_width, value, scale=1.0):
    """(output, its variables by path) of a consumption whose parameters are random."""
    with on_mesh(ONE_DEVICE) as mesh:
        module = jax.jit(lambda key: consume.build(key, BACKBONE, value_width))(jax.random.key(0))
        graph, state = nnx.split(module)
        rng = np.random.default_rng(7)
        state = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * scale, to_numpy(state))

        @jax.jit
        def run(state, value):
            around = Surroundings(
                x=jnp.asarray(X), h=jnp.asarray(H), segments=jnp.asarray(SEGMENTS), embedded=jnp.asarray(EMBEDDED)
            )
            return nnx.merge(graph, state)(value, around)

        out = to_numpy(run(put_params(state, mesh), jnp.asarray(value)))
    flat = {".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}
    return out, flat


VALUE = np.random.default_rng(5).normal(size=(*REAL.shape, 6)).astype(np.float32)


def assert_rows(out, of_row):
    """`of_row(b)` gives what is added in row b, token by token."""
    wanted = np.stack([of_row(b) for b in range(2)]).astype(np.float32)
    assert_close(out.delta[REAL], wanted[REAL])


def test_added_and_projected_values():
    out, _ = consumed(Add(), WIDTH, X)
    assert np.array_equal(out.delta, X)
    out, w = consumed(Project(), 6, VALUE)
    assert_rows(out, lambda b: VALUE[b] @ w["weight.weight"])


def test_concat_is_a_product_with_both():
    out, w = consumed(Concat(), 6, VALUE)
    assert_rows(out, lambda b: slow.concat(X[b], VALUE[b], w["of_stream.weight"], w["of_value.weight"]))


@pytest.mark.parametrize("consume", [GatedOutput(), UpProjection()])
def test_gated_output_and_up_projection(consume):
    out, w = consumed(consume, 6, VALUE)
    assert_rows(out, lambda b: slow.gated_output(H[b], VALUE[b], w["w_gate.weight"], w["w_out.weight"]))


@pytest.mark.parametrize("kernel,dilation", [(4, 3), (2, 1), (1, 1)])
def test_engrams_gate_and_convolution(kernel, dilation):
    out, w = consumed(GatedAdd(kernel=kernel, dilation=dilation), 6, VALUE)
    names = ("w_key.weight", "w_value.weight", "key_norm.scale", "value_norm.scale", "kernel")
    of_row = lambda b: slow.gated_add(H[b], VALUE[b], SEGMENTS[b], *[w[name] for name in names], dilation)  # noqa: E731
    assert_rows(out, lambda b: of_row(b)[0])
    gates = np.stack([of_row(b)[1] for b in range(2)]).astype(np.float32)
    assert_close(out.gate[REAL], gates[REAL])


def test_per_layer_embeddings_gate():
    out, w = consumed(PerLayer(), 6, VALUE)
    names = ("w_context.weight", "context_norm.scale", "w_gate.weight", "w_out.weight", "out_norm.scale")
    assert_rows(out, lambda b: slow.per_layer(H[b], EMBEDDED[b], VALUE[b], *[w[name] for name in names]))


@pytest.mark.parametrize("consume", [Project(), Concat(), GatedOutput(), UpProjection(), GatedAdd(), PerLayer(), Add()])
def test_parameters_of_consumptions_are_counted(consume):
    _, w = consumed(consume, 6, VALUE if not isinstance(consume, Add) else X)
    assert consume.size(BACKBONE, 6)[0] == sum(value.size for value in w.values())
    matrices = sum(value.size for name, value in w.items() if name.endswith("weight"))
    assert consume.size(BACKBONE, 6)[1] == matrices


def test_wide_partial_experts_are_a_mixture_without_capacity():
    """Rank d_ff, the most probable of four: act(x W_in) W_out of that expert, times its probability."""
    experts, rank = 4, 16
    rng = np.random.default_rng(3)
    w_in, w_out = rng.normal(size=(experts, WIDTH, rank)), rng.normal(size=(experts, rank, WIDTH))
    table = np.concatenate([w_in.transpose(0, 2, 1).reshape(experts, -1), w_out.reshape(experts, -1)], axis=1)
    scores = rng.normal(size=(WIDTH, experts)).astype(np.float32)
    inputs = jnp.asarray(H)
    p = jax.nn.softmax(inputs @ scores, axis=-1)
    best = np.asarray(p.argmax(-1))
    content = PartialExpert(rank=rank)
    value = content.value(inputs, jnp.asarray(table[best][:, :, None], jnp.float32), p.max(-1, keepdims=True))
    hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", inputs, w_in))
    dense = jnp.einsum("btef,efd->bted", hidden, w_out) * p[..., None]
    assert_close(value, jnp.take_along_axis(dense, best[..., None, None], axis=2)[:, :, 0].astype(jnp.float32))


def test_all_entries_of_a_softmax_are_a_dense_product():
    address = Softmax(entries=5, k=5)
    scores, table = RNG.normal(size=(WIDTH, 5)).astype(np.float32), RNG.normal(size=(5, WIDTH)).astype(np.float32)
    inputs = Inputs(tokens=jnp.zeros(REAL.shape, jnp.int32), segments=jnp.ones(REAL.shape, jnp.int32), h=jnp.asarray(H))
    found = address(inputs, {"scores": jnp.asarray(scores)}, 32)
    assert found.weights is not None
    value = Vector().value(jnp.asarray(H), jnp.asarray(table)[found.ids], found.weights)
    assert_close(value, jax.nn.softmax(H @ scores, axis=-1) @ table)


@pytest.mark.parametrize(
    "content,consume,fits",
    [
        (PartialExpert(), Add(), "vector, key_values"),
        (Vector(), Expert(), "partial_expert"),
        (Vector(), UpProjection(), "gate_row"),
        (GateRow(), PerLayer(), "vector, key_values"),
    ],
)
def test_a_pair_that_does_not_go_together_is_refused(content, consume, fits):
    names = CONTENTS.name_of(content)
    with pytest.raises(ConfigError, match=f"content={names}; it goes with content={fits}$") as error:
        MemorySpec(content=content, consume=consume)
    assert error.value.key == "consume"
