"""The largest sums of two lists without forming all of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def product_key_top_k(
    rows: Float[Array, "*B M"], columns: Float[Array, "*B N"], k: int
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """(values, i · N + j) of the k largest rows_i + columns_j, largest first (Lample et al., arXiv:1907.05242).

    Exact: were i not among the k best rows, k sums with the same j would be at least as large. So k · k sums are formed
    at most, not M · N. Which of equal sums are taken is not specified. Needs k ≤ M · N."""
    num_columns = columns.shape[-1]
    row_values, row_index = jax.lax.top_k(rows, min(k, rows.shape[-1]))
    column_values, column_index = jax.lax.top_k(columns, min(k, num_columns))
    batch = rows.shape[:-1]
    sums = (row_values[..., :, None] + column_values[..., None, :]).reshape(*batch, -1)
    indices = (row_index[..., :, None] * num_columns + column_index[..., None, :]).reshape(*batch, -1)
    values, best = jax.lax.top_k(sums, k)
    return values, jnp.take_along_axis(indices, best, axis=-1)
