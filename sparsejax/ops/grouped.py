"""Dropless experts: every pair is computed, whatever the loads. What moves is decided elsewhere; here pairs lie in one
list (`one_group`), sorted by expert once, and forward and backward pass read the same indices.

`slots` is for XLA on any platform. Every expert has the same number of slots, enough for loads that are nearly even,
and its network runs on them as one batched product. What does not fit is computed in blocks of rows of one expert, as
many as the loads ask for. When much would not fit, there are only blocks.

`megablox` (Pallas, TPU) and `ragged_dot` (XLA) multiply the sorted rows as they are; some compilers turn the latter
into E dense products (`ragged_dot_cost`)."""

import dataclasses
import functools
import math
from typing import Literal, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sparsejax.base.sharding import vary_like
from sparsejax.base.structs import struct
from sparsejax.ops.assignment import Pairs, Slots
from sparsejax.ops.dispatch import (
    Index,
    at,
    combine_rows,
    dispatch_rows,
    near,
    slot_index,
    sorted_index,
    sum_slots,
    weight_rows,
)
from sparsejax.ops.ffn import (
    Activation,
    Specs,
    Weights,
    after,
    expert_down,
    expert_ffn,
    expert_up,
    hidden,
    scaled,
    whole_weights,
)

Implementation = Literal["slots", "megablox", "ragged_dot"]

LARGE_BLOCK = 512
"""Rows of a block that amortise reading an expert's weights and adding to their gradient."""


def common_slots(pairs: int, num_experts: int) -> int:
    """Slots that every expert has: half a standard deviation of uniform routing above the mean load, a multiple of 8;
    none when there are fewer pairs than experts, many of which then need not be read."""
    mean = pairs / num_experts
    if mean < 1:
        return 0
    return min(pairs, 8 * math.ceil((mean + 0.5 * math.sqrt(mean)) / 8))


def grouped_experts(
    x_TD: Float[Array, "T D"],
    weights: Weights,
    specs: Optional[Specs],
    pairs: Pairs,
    slots: Slots,
    activation: Activation,
    implementation: Implementation,
) -> tuple[Float[Array, "T D"], Int[Array, ""], Int[Array, ""]]:
    """(Σ over each token's pairs of weight · its expert's output; rows computed; those of them in blocks), int32.

    Args:
      specs: how the weights are split for storage; forward and backward pass gather them.
      pairs: of one group, none of them dropped.
      slots: what `fill_slots` says of them, with `common_slots` slots.
    """
    for weight in weights:  # one type for all, so that their cotangents have it, too
        x_TD = vary_like(x_TD, weight)
    weights = tuple(vary_like(weight, x_TD) for weight in weights)
    weight_P = vary_like(pairs.weight[0], x_TD)
    if implementation == "slots":
        plan = _plan(pairs, slots)
        y_TD = jnp.asarray(_experts(activation, specs, x_TD, weights, weight_P, plan))
        in_blocks = sum((size * blocks.end_E[-1] for size, blocks in plan.blocks), jnp.int32(0))
        return y_TD, jnp.where(plan.even, slots.pair.size, 0) + in_blocks, in_blocks
    sizes_E = slots.start[0, 1:] - slots.start[0, :-1]
    index = sorted_index(pairs, slots, sizes_E, -(-pairs.token.shape[1] // ROW_TILE) * ROW_TILE)
    multiply = functools.partial(grouped_matmul, sizes_E=sizes_E, implementation=implementation)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # as in `expert_ffn`
    def up(z_ND, weights):
        w_in, _, *gate = whole_weights(weights, specs, z_ND)
        return tuple(multiply(z_ND, weight) for weight in (w_in, *gate))

    up_NF = up(dispatch_rows(x_TD, index), weights)
    spec = None if specs is None else specs[1]
    out_ND = _down(activation, spec, implementation, up_NF, weights[1], weight_rows(weight_P, index), sizes_E)
    y_TD = jnp.asarray(combine_rows(out_ND, index))
    return y_TD, jnp.int32(index.pair_N.size), jnp.int32(0)


# Slots for what is even, blocks for the rest.


@struct
class Blocks:
    """Equal blocks of one expert's rows each. Expert e's are numbers `end[e − 1]` … `end[e] − 1`."""

    end_E: Int[Array, " E"]
    first_E: Int[Array, " E"]  # where e's first block begins among the pairs sorted by expert


@struct
class Plan:
    """Who is where."""

    even: Bool[Array, ""]  # whether the common slots are used
    index: Index  # of the common slots
    token_P: Int[Array, " P"]
    order_P: Int[Array, " P"]  # pairs by expert
    end_E: Int[Array, " E"]  # where each expert's end
    large: Blocks
    small: Blocks

    @property
    def blocks(self) -> tuple[tuple[int, Blocks], ...]:
        """(rows of a block, blocks)."""
        num_slots = self.index.pair_N.size // self.end_E.size
        return (LARGE_BLOCK, self.large), (_small_block(num_slots), self.small)


def _small_block(num_slots: int) -> int:
    """An eighth of the slots: few rows of a block stay empty, and few blocks are needed when loads are nearly even."""
    return max(8, num_slots // 64 * 8)


def _plan(pairs: Pairs, slots: Slots) -> Plan:
    num_slots = slots.pair.shape[-1]
    first_E, end_E = slots.start[0, :-1], slots.start[0, 1:]
    excess_E = jnp.maximum(end_E - first_E - num_slots, 0)
    even = excess_E.sum() <= end_E[-1] // 4
    first_E = jnp.where(even, jnp.minimum(first_E + num_slots, end_E), first_E)
    large_E = (end_E - first_E) // LARGE_BLOCK
    after_E = first_E + large_E * LARGE_BLOCK
    small_E = -(-(end_E - after_E) // _small_block(num_slots))
    in_slots = dataclasses.replace(slots, keep=slots.keep & (slots.position < num_slots))
    return Plan(
        even=even,
        index=slot_index(pairs, in_slots),
        token_P=pairs.token[0],
        order_P=slots.order[0],
        end_E=end_E,
        large=Blocks(end_E=jnp.cumsum(large_E, dtype=jnp.int32), first_E=first_E),
        small=Blocks(end_E=jnp.cumsum(small_E, dtype=jnp.int32), first_E=after_E),
    )


def _block(number: Int[Array, ""], size: int, blocks: Blocks, plan: Plan):
    """(expert, its pairs [size], their tokens [size]) of a block; one past the end stands for nobody."""
    expert = jnp.searchsorted(blocks.end_E, number, side="right").astype(jnp.int32)
    before = jnp.where(expert > 0, blocks.end_E[expert - 1], 0)
    rank_B = blocks.first_E[expert] + (number - before) * size + jnp.arange(size, dtype=jnp.int32)
    nobody = plan.order_P.size
    pair_B = jnp.where(rank_B < plan.end_E[expert], at(plan.order_P, rank_B), nobody)
    return expert, pair_B, at(plan.token_P, pair_B, fill=nobody)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(activation: Activation, specs: Optional[Specs], x_TD, stored: Weights, weight_P, plan: Plan):
    return _experts_fwd(activation, specs, x_TD, stored, weight_P, plan)[0]


def _experts_fwd(activation: Activation, specs: Optional[Specs], x_TD, stored: Weights, weight_P, plan: Plan):
    index, weights = plan.index, whole_weights(stored, specs, x_TD)

    def common(x_TD, weights, weight_P):
        up = expert_up(_by_expert(near(x_TD, index.token_N), weights), weights)
        out_END = expert_down(up, weights, activation, _by_expert(at(weight_P, index.pair_N), weights))
        return sum_slots(out_END.reshape(-1, x_TD.shape[1]), index), up

    y_TD, up = _if_even(plan, common, x_TD, weights, weight_P)
    for size, blocks in plan.blocks:

        def add_block(number, y_TD, size=size, blocks=blocks):
            expert, pair_B, token_B = _block(number, size, blocks, plan)
            scale_B = at(weight_P, pair_B)
            out_BD = expert_ffn(near(x_TD, token_B), _weights_of(expert, weights), activation, scale_B)
            return y_TD.at[token_B].add(out_BD.astype(jnp.float32), mode="drop")

        y_TD = jax.lax.fori_loop(0, blocks.end_E[-1], add_block, y_TD)
    return y_TD.astype(x_TD.dtype), (x_TD, stored, weight_P, plan, up)


def _experts_bwd(activation: Activation, specs: Optional[Specs], residuals, dy_TD):
    """Slots keep their hidden layer, blocks compute it again. Nothing is kept of the output: the gradient of
    a combine weight falls off at the hidden layer."""
    x_TD, stored, weight_P, plan, up = residuals
    index = plan.index
    weights, scatter = jax.vjp(lambda stored: whole_weights(stored, specs, x_TD), stored)

    def common(dy_TD, x_TD, weights, weight_P, up):
        scale_EN = _by_expert(at(weight_P, index.pair_N), weights)
        _, pull_down = jax.vjp(
            lambda up, weights, scale: expert_down(up, weights, activation, scale), up, weights, scale_EN
        )
        dup, dweights_down, dscale_EN = pull_down(_by_expert(near(dy_TD, index.token_N), weights))
        z_ND = near(x_TD, after(dup[0], index.token_N))  # once other rows have made room for these
        _, pull_up = jax.vjp(expert_up, _by_expert(z_ND, weights), weights)
        dz_END, dweights_up = pull_up(dup)
        dweights = jax.tree.map(_float32_sum, dweights_up, dweights_down)
        return sum_slots(dz_END.reshape(-1, x_TD.shape[1]), index), dweights, at(dscale_EN.reshape(-1), index.slot_P)

    grads = _if_even(plan, common, dy_TD, x_TD, weights, weight_P, up)
    for size, blocks in plan.blocks:

        def add_block(number, grads, size=size, blocks=blocks):
            dx_TD, dweights, dweight_P = grads
            expert, pair_B, token_B = _block(number, size, blocks, plan)
            rows = near(x_TD, token_B), _weights_of(expert, weights), at(weight_P, pair_B)
            _, pull = jax.vjp(lambda x, weights, scale: expert_ffn(x, weights, activation, scale), *rows)
            dx_BD, dweights_of_one, dscale_B = pull(near(dy_TD, token_B))
            return (
                dx_TD.at[token_B].add(dx_BD.astype(jnp.float32), mode="drop"),
                tuple(_add_at(*both, expert) for both in zip(dweights, dweights_of_one, strict=True)),
                dweight_P.at[pair_B].set(dscale_B, mode="drop"),
            )

        grads = jax.lax.fori_loop(0, blocks.end_E[-1], add_block, grads)
    dx_TD, dweights, dweight_P = grads
    dx_TD, dweights = jax.tree.map(lambda value, grad: grad.astype(value.dtype), (x_TD, weights), (dx_TD, dweights))
    return dx_TD, *scatter(dweights), dweight_P, None


_experts.defvjp(_experts_fwd, _experts_bwd)


def _float32_sum(a: Array, b: Array) -> Array:
    """Blocks add to it, and low precision would lose them."""
    return a.astype(jnp.float32) + b.astype(jnp.float32)


def _if_even(plan: Plan, function, *operands):
    """`function` of the operands, or zeros of its shapes when the common slots are not used."""
    shapes = jax.eval_shape(function, *operands)
    zeros = lambda *_: jax.tree.map(lambda s: vary_like(jnp.zeros(s.shape, s.dtype), operands[0]), shapes)  # noqa: E731
    return jax.lax.cond(plan.even, function, zeros, *operands) if plan.index.pair_N.size else zeros()


def _by_expert(values_N: Array, weights: Weights) -> Array:
    """`[N, …]` → `[E, N / E, …]`."""
    experts = weights[0].shape[0]
    return values_N.reshape(experts, len(values_N) // experts, *values_N.shape[1:])


def _weights_of(expert: Int[Array, ""], weights: Weights) -> Weights:
    return tuple(jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False) for weight in weights)


def _add_at(stack: Array, value: Array, expert: Int[Array, ""]) -> Array:
    """In place: a scatter would be a pass over the whole stack."""
    sum_ = jax.lax.dynamic_index_in_dim(stack, expert, keepdims=False) + value
    return jax.lax.dynamic_update_index_in_dim(stack, sum_, expert, 0)


# Sorted rows, for kernels that multiply them as they are.

ROW_TILE = 128
"""Kernels want a multiple of this many rows."""
WIDTH_TILE = 1024
"""Columns that they multiply at once."""


def grouped_matmul(
    lhs_ND: Float[Array, "N D"],
    rhs_EDF: Float[Array, "E D F"],
    sizes_E: Int[Array, " E"],
    implementation: Literal["megablox", "ragged_dot"],
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """Rows, sorted by expert, times their expert's matrix; rows beyond Σ sizes have no meaning. `interpret` runs the
    kernel anywhere, slowly. N is a multiple of `ROW_TILE`."""
    if implementation == "ragged_dot":
        # Outside `shard_map`, where axes are explicit: there is no rule for its gradient on those.
        explicit = jax.sharding.get_abstract_mesh().explicit_axes
        multiply = jax.sharding.auto_axes(jax.lax.ragged_dot, out_sharding=P()) if explicit else jax.lax.ragged_dot
        return multiply(lhs_ND, rhs_EDF, sizes_E)
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm  # heavy, and only a TPU or its compiler needs it

    rows = next(tile for tile in (512, 256, ROW_TILE) if lhs_ND.shape[0] % tile == 0)
    tiling = (rows, *(min(WIDTH_TILE, width) for width in rhs_EDF.shape[1:]))
    return gmm(lhs_ND, rhs_EDF, sizes_E, lhs_ND.dtype, tiling, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _down(activation: Activation, spec: Optional[P], implementation, up, stored_EFD, scale_N, sizes_E):
    """`expert_down` of sorted rows."""
    hidden_NF = scaled(hidden(up, activation), scale_N)
    return grouped_matmul(hidden_NF, _whole(stored_EFD, spec, up[0]), sizes_E, implementation)


def _down_fwd(activation: Activation, spec: Optional[P], implementation, up, stored_EFD, scale_N, sizes_E):
    out_ND = _down(activation, spec, implementation, up, stored_EFD, scale_N, sizes_E)
    return out_ND, (up, stored_EFD, scale_N, sizes_E)


def _down_bwd(activation: Activation, spec: Optional[P], implementation, residuals, dout_ND):
    """Part by part of the hidden width, each of which makes way for its gradient: the hidden layer and its gradient,
    which are computed on the way, are the largest arrays of a step."""
    up, stored_EFD, scale_N, sizes_E = residuals
    w_EFD, scatter = jax.vjp(lambda stored_EFD: _whole(stored_EFD, spec, up[0]), stored_EFD)
    width = part_width(*w_EFD.shape[1:])

    def down(up, w_EFD, scale_N):
        return grouped_matmul(scaled(hidden(up, activation), scale_N), w_EFD, sizes_E, implementation)

    def replace_part(number, carry):
        of_up, of_w, dscale_N = carry
        part = lambda array: jax.lax.dynamic_slice_in_dim(array, number * width, width, axis=1)  # noqa: E731
        _, pull = jax.vjp(down, jax.tree.map(part, of_up), part(of_w), scale_N)
        # All read before any is overwritten, or the compiler copies what it could write in place.
        dup, dw_EFD, more_N = jax.lax.optimization_barrier(pull(dout_ND))
        put = lambda array, new: jax.lax.dynamic_update_slice_in_dim(array, new, number * width, axis=1)  # noqa: E731
        return jax.tree.map(put, of_up, dup), put(of_w, dw_EFD), dscale_N + more_N

    carry = up, w_EFD, jnp.zeros_like(scale_N)
    dup, dw_EFD, dscale_N = jax.lax.fori_loop(0, w_EFD.shape[1] // width, replace_part, carry)
    return dup, *scatter(dw_EFD), dscale_N, None


_down.defvjp(_down_fwd, _down_bwd)


def _whole(stored_EFD: Array, spec: Optional[P], like: Array) -> Array:
    return whole_weights((stored_EFD,), None if spec is None else (spec,), like)[0]


def part_width(hidden_width: int, model_width: int) -> int:
    """Of the parts in which the backward pass goes through the hidden layer: whole tiles of the kernels, no wider than
    the rows of the model; all of it where it is not made of such."""
    widths = range(WIDTH_TILE, max(model_width, WIDTH_TILE) + 1, WIDTH_TILE)
    return max((width for width in widths if hidden_width % width == 0), default=hidden_width)


@functools.cache
def ragged_dot_cost() -> Optional[float]:
    """FLOPs of `ragged_dot`, forward and backward, as this platform compiles it, over those of its rows: near 1, or
    near E = 8 if dense. None where the compiler does not tell."""
    rows, width, num_experts = 256, 64, 8
    lhs, rhs, out, sizes = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, width), jnp.float32),
            ((num_experts, width, width), jnp.float32),
            ((rows, width), jnp.float32),
            ((num_experts,), jnp.int32),
        )
    )

    def with_gradients(lhs, rhs, dout, sizes):
        found, pull = jax.vjp(lambda lhs, rhs: jax.lax.ragged_dot(lhs, rhs, sizes), lhs, rhs)
        return found, pull(dout)

    told: Optional[dict] = jax.jit(with_gradients).lower(lhs, rhs, out, sizes).compile().cost_analysis()
    flops = (told or {}).get("flops", 0)
    return flops / (3 * 2 * rows * width * width) if flops > 0 else None
