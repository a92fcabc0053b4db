"""A residual of K streams: X' = P X + g ⊗ (L(u) − sᵀX), with u = cᵀX the input of the layer L.

AltUp, hyper-connections and their kin differ in what P, g, s and c are. Streams are a tuple of K arrays, not one with
an axis K: a layer reads one of them and leaves the others where they are. Coefficients are float32, of one layer `[…]`
or of every token `[…, B, T]`, and the sums are taken in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Streams = tuple[Float[Array, "B T D"], ...]


def weighted(weights: Float[Array, "K *BT"], streams: Streams) -> Float[Array, "B T D"]:
    """Σ_k w_k x_k in float32."""
    total = _times(weights[0], streams[0])
    for weight, stream in zip(weights[1:], streams[1:], strict=True):
        total += _times(weight, stream)
    return total


def chosen(streams: Streams, index: int | Int[Array, ""]) -> Float[Array, "B T D"]:
    """Stream number `index`; a number that is known to the compiler costs nothing."""
    return streams[index] if isinstance(index, int) else jax.lax.select_n(index, *streams)


def row(matrix: Float[Array, "K *X"], index: int | Int[Array, ""]) -> Float[Array, "*X"]:
    """Row `index` of a matrix of coefficients."""
    return matrix[index] if isinstance(index, int) else jax.lax.dynamic_index_in_dim(matrix, index, 0, keepdims=False)


def updated(
    streams: Streams,
    y_BTD: Float[Array, "B T D"],
    transition: Float[Array, "K K *BT"],
    gain: Float[Array, "K *BT"],
    expected: Float[Array, "K *BT"],
) -> Streams:
    """P X + g ⊗ (y − sᵀX), as one pass over the streams: (P − g sᵀ) X + g ⊗ y.

    With P = I, g = 1, equal streams and s = e_j each is exactly y: x_i − x_j is 0, whereas x_i + (y − x_j) would round.
    """
    kept = transition - gain[:, None] * expected[None, :]
    return tuple(
        (weighted(weights, streams) + _times(strength, y_BTD)).astype(stream.dtype)
        for weights, strength, stream in zip(kept, gain, streams, strict=True)
    )


def added(streams: Streams, delta_BTD: Float[Array, "B T D"], index: int | Int[Array, ""]) -> Streams:
    """The streams, stream number `index` with something added to it."""
    if isinstance(index, int):
        return *streams[:index], streams[index] + delta_BTD, *streams[index + 1 :]
    return tuple(stream + jnp.where(index == k, delta_BTD, 0) for k, stream in enumerate(streams))


def mean(streams: Streams) -> Float[Array, "B T D"]:
    """x_0 + mean of x_k − x_0, which for equal streams is exactly x_0, whatever their number."""
    first = streams[0].astype(jnp.float32)
    apart = sum((stream.astype(jnp.float32) - first for stream in streams[1:]), jnp.zeros_like(first))
    return (first + apart / len(streams)).astype(streams[0].dtype)


def gram(streams: Streams) -> Float[Array, "K K B T"]:
    """⟨x_i, x_k⟩ of every token, float32."""
    wide = [stream.astype(jnp.float32) for stream in streams]
    products = {(i, k): jnp.sum(wide[i] * wide[k], -1) for i in range(len(wide)) for k in range(i, len(wide))}
    order = range(len(wide))
    return jnp.stack([jnp.stack([products[min(i, k), max(i, k)] for k in order]) for i in order])


def _times(weight: Float[Array, "*BT"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return (weight if weight.ndim == 0 else weight[..., None]) * x_BTD.astype(jnp.float32)


def of_magnitude(x_BTD: Float[Array, "B T D"], like_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x scaled so that the root mean square of every token is that of `like`."""
    wide, like = x_BTD.astype(jnp.float32), like_BTD.astype(jnp.float32)
    power = lambda x: jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-10  # noqa: E731
    return (wide * jnp.sqrt(power(like) / power(wide))).astype(x_BTD.dtype)


def sinkhorn(logits: Float[Array, "K K *BT"], iterations: int) -> Float[Array, "K K *BT"]:
    """exp(logits) made doubly stochastic: its columns, then its rows are divided by their sums, so often (Sinkhorn &
    Knopp 1967). Rows then add up to 1 to rounding, columns to what the iterations have reached."""

    def once(_, matrix):
        matrix = matrix / matrix.sum(0, keepdims=True)
        return matrix / matrix.sum(1, keepdims=True)

    matrix = jnp.exp(logits - jax.lax.stop_gradient(logits.max((0, 1), keepdims=True)))
    return jax.lax.fori_loop(0, iterations, once, matrix)
