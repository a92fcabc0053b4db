"""The losses of a head in pieces against logits as a whole, on one device and on meshes that split rows, weight and
vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES
from sparsejax.ops import head_loss
from sparsejax.ops.attention import soft_capped
from sparsejax.ops.head_loss import HeadKind, Weighting, head_losses, pieces
from sparsejax.ops.losses import cross_entropies, kls, symmetric_kls

from support import ONE_DEVICE, assert_close, on_mesh, to_numpy

ROWS, LENGTH, WIDTH, VOCAB, SCALE = 8, 6, 4, 10, 0.25
TIED = ("nd,vd->nv", (VOCAB, WIDTH), P("tensor", "data"))
OWN = ("nd,dv->nv", (WIDTH, VOCAB), P("data", "tensor"))
CAPPED = HeadKind(equation=OWN[0], dtype="float32", soft_cap=2.0)
EXITS = Weighting(hard=np.array([0.2, 0.0, 0.5], np.float32), soft=np.array([0.1, 0.7, 0.0], np.float32))
THREE = HeadKind(equation=TIED[0], dtype="float32", distill=True)
APART = HeadKind(equation=OWN[0], dtype="float32", distill=True, heads=(1, 2, 0))
TWO = HeadKind(equation=TIED[0], dtype="float32", consistency=3.0)


def arrays(shape, passes):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = rng.random((ROWS, LENGTH)) < 0.8
    features = tuple(normal(ROWS, LENGTH, WIDTH) for _ in range(passes))
    return features, normal(*shape), rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32), mask


def as_a_whole(kind, passes, weight, targets, mask):
    """(total, nll by pass, divergence, correct), from all logits at once."""
    equation = kind.equation.replace("n", "bt")
    logits = [soft_capped(jnp.einsum(equation, x, weight), kind.soft_cap) for x in passes]
    nll = tuple(cross_entropies(each, targets, mask) for each in logits)
    divergence = jnp.float32(0) if kind.consistency is None else symmetric_kls(*logits, mask).sum()
    correct = jnp.stack([(mask & (each.argmax(-1) == targets)).sum(dtype=jnp.int32) for each in logits])
    return sum(each.sum() for each in nll) + (kind.consistency or 0) * divergence, nll, divergence, correct


def expected(kind, shape, passes):
    operands = arrays(shape, passes)
    scaled = lambda *args: SCALE * as_a_whole(kind, *args)[0]  # noqa: E731
    return to_numpy((as_a_whole(kind, *operands), jax.grad(scaled, argnums=(0, 1))(*operands)))


@pytest.mark.parametrize("mesh", [ONE_DEVICE, (2, 2, 2), (1, 1, 2)])
@pytest.mark.parametrize(("kind", "head", "passes"), [(CAPPED, OWN, 1), (TWO, TIED, 2)], ids=["capped", "two passes"])
def test_pieces_lose_what_the_whole_does(kind, head, passes, mesh, monkeypatch):
    monkeypatch.setattr(head_loss, "AT_ONCE", 20)  # of 60 … 480 on a device
    _, shape, stored = head
    features, weight, *others = arrays(shape, passes)
    with on_mesh(mesh) as devices:
        put = lambda array, spec: jax.device_put(array, NamedSharding(devices, spec))  # noqa: E731
        rows = jax.tree.map(lambda array: put(array, P(BATCH_AXES)), (features, *others))

        def loss(features, weight, *others):
            lost = head_losses(kind, features, weight, *others)
            return SCALE * lost.total, (lost.total, lost.nll, lost.divergence, lost.correct)

        operands = rows[0], put(weight, stored), *rows[1:]
        grads, found = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*operands)
        alone = jax.jit(loss)(*operands)[1]
        assert grads[1].sharding.spec == stored
    told, of = expected(kind, shape, passes)
    assert (told[3] > 0).all()
    assert_close(to_numpy((found, grads)), (told, of))
    assert_close(to_numpy(alone), told)


def exits_as_a_whole(kind, passes, weights, targets, mask):
    """(total, nll by exit, its part from KL, hits by exit), from all logits at once; the last teaches and learns
    nothing by that."""
    heads = kind.heads or (0, 0, 0)
    pairs = zip(passes, heads, strict=True)
    logits = [jnp.einsum(kind.equation.replace("n", "bt"), x, weights[head]) for x, head in pairs]
    nll = tuple(cross_entropies(each, targets, mask) for each in logits)
    log_p, *log_q = (jax.nn.log_softmax(each) for each in (jax.lax.stop_gradient(logits[-1]), *logits[:-1]))
    far = [jnp.where(mask, (jnp.exp(log_p) * (log_p - each)).sum(-1), 0).sum() for each in log_q]
    divergence = EXITS.soft[0] * far[0] + EXITS.soft[1] * far[1]
    correct = jnp.stack([(mask & (each.argmax(-1) == targets)).sum(dtype=jnp.int32) for each in logits])
    return sum(w * each.sum() for w, each in zip(EXITS.hard, nll, strict=True)) + divergence, nll, divergence, correct


@pytest.mark.parametrize("mesh", [ONE_DEVICE, (2, 2, 2)])
@pytest.mark.parametrize(("kind", "head"), [(THREE, TIED), (APART, OWN)], ids=["shared", "own"])
def test_exits_lose_by_their_weights_and_learn_from_the_last(kind, head, mesh, monkeypatch):
    monkeypatch.setattr(head_loss, "AT_ONCE", 60)
    _, shape, stored = head
    features, weight, *others = arrays(shape, 3)
    weights = tuple(weight * factor for factor in ((1.0, 0.5, -0.3) if kind.heads else (1.0,)))
    with on_mesh(mesh) as devices:
        put = lambda array, spec: jax.device_put(array, NamedSharding(devices, spec))  # noqa: E731
        rows = jax.tree.map(lambda array: put(array, P(BATCH_AXES)), (features, *others))

        def loss(features, weights, *others):
            lost = head_losses(kind, features, weights[0], *others, EXITS, weights[1:])
            return SCALE * lost.total, (lost.total, lost.nll, lost.divergence, lost.correct)

        operands = rows[0], tuple(put(each, stored) for each in weights), *rows[1:]
        found = to_numpy(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*operands))
        alone = to_numpy(jax.jit(loss)(*operands)[1])
    whole = lambda *args: SCALE * exits_as_a_whole(kind, *args)[0]  # noqa: E731
    given = features, weights, *others
    told = to_numpy(exits_as_a_whole(kind, *given))
    assert_close(found, (to_numpy(jax.grad(whole, argnums=(0, 1))(*given)), told))
    assert_close(alone, told)
    assert_close(to_numpy(kls(weight, 2 * weight, weight[:, 0] > 9)), np.zeros(len(weight), np.float32))


def test_no_array_holds_the_logits_of_all(monkeypatch):
    monkeypatch.setattr(head_loss, "AT_ONCE", ROWS * LENGTH * VOCAB // 4)
    features, weight, *others = arrays(OWN[1], 1)
    gradient = jax.grad(lambda *args: head_losses(CAPPED, *args).total, argnums=(0, 1))
    with on_mesh(ONE_DEVICE) as mesh:
        put = lambda array: jax.device_put(array, NamedSharding(mesh, P(BATCH_AXES)))  # noqa: E731
        rows = jax.tree.map(put, (features, *others))
        text = str(jax.make_jaxpr(gradient)(rows[0], jnp.asarray(weight), *rows[1:]))
    assert f"f32[{ROWS * LENGTH // 4},{VOCAB}]" in text
    assert f"[{ROWS * LENGTH},{VOCAB}]" not in text and f"[{ROWS},{LENGTH},{VOCAB}]" not in text


@pytest.mark.parametrize(
    ("tokens", "vocab", "number"), [(32_768, 32_000, 16), (128, 256, 1), (1, 2**27, 1), (6, 2**26, 6), (7, 2**24, 7)]
)
def test_as_few_pieces_as_have_room(tokens, vocab, number):
    assert pieces(tokens, vocab) == number
