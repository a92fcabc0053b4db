"""Does moving tokens scale? Dispatch and combine, per token, at 4k and at 64k tokens in one group.

Run:  python benchmarks/dispatch.py [--rounds=25]

Slots, dispatch and combine, with the gradient with respect to tokens and weights; float32, d = 512, E = 8, k = 1,
capacity factor 1.0. The sizes take turns, sixteen calls with 4k tokens and one with 64k, after one uncounted call each
(the other size has just taken their memory); the figure is the median over rounds of the ratio of time per token.

Experts are a ReLU. Then, at 4k tokens, top-1 routing from scores, dispatch and combine, against the least that this
can be: one stable argsort, one gather of rows to the experts and one back, times the scores, and gathers alone in the
backward pass."""

import argparse

import jax
import jax.numpy as jnp

from sparsejax.ops.assignment import choice_major_pairs, fill_slots
from sparsejax.ops.capacity import capacity
from sparsejax.ops.dispatch import MOVEMENTS, slot_weights
from sparsejax.train.timing import interleaved

from timing import quartiles

WIDTH, EXPERTS, K = 512, 8, 1


def moved_and_weighted(x, pairs, slots):
    """To the experts, each a ReLU and its weight, and back. A layer applies weights where its experts' activation
    is."""
    movement = MOVEMENTS["gather"]
    z = movement.dispatch(x, pairs, slots)
    rows = jax.nn.relu(z.reshape(-1, WIDTH)) * slot_weights(pairs, slots).reshape(-1, 1)
    return movement.combine(rows.reshape(z.shape), pairs, slots)


def competitor(tokens: int):
    """A call that dispatches and combines `tokens` tokens, forward and backward."""
    keys = jax.random.split(jax.random.key(0), 4)
    experts = jax.random.randint(keys[0], (1, tokens, K), 0, EXPERTS)
    x, cotangent = (jax.random.normal(key, (1, tokens, WIDTH)) for key in keys[1:3])
    weights = jax.random.uniform(keys[3], (1, tokens, K))
    slots_each = capacity(tokens, EXPERTS, K, 1.0, "per_choice")

    def moved(x, weights, experts):
        pairs = choice_major_pairs(experts, weights, jnp.ones((1, tokens), bool))
        slots = fill_slots(pairs, EXPERTS, slots_each, jnp.full(1, slots_each, jnp.int32))
        return jnp.sum(moved_and_weighted(x, pairs, slots) * cotangent)

    step = jax.jit(jax.value_and_grad(moved, argnums=(0, 1)))
    return lambda: step(x, weights, experts)


def routed(tokens: int):
    """(a call of routing, dispatch and combine by the library; by the hand-written minimum)."""
    keys = jax.random.split(jax.random.key(1), 3)
    logits = jax.random.normal(keys[0], (tokens, EXPERTS))
    x, cotangent = (jax.random.normal(key, (tokens, WIDTH)) for key in keys[1:])
    slots_each = tokens // EXPERTS

    def library(x, logits):
        scores, experts = jax.lax.top_k(jax.nn.softmax(logits)[None], 1)
        pairs = choice_major_pairs(experts, scores, jnp.ones((1, tokens), bool))
        slots = fill_slots(pairs, EXPERTS, slots_each, jnp.full(1, slots_each, jnp.int32))
        return jnp.sum(moved_and_weighted(x[None], pairs, slots)[0] * cotangent)

    @jax.custom_vjp
    def permuted(x, order, inverse):
        return x[order]

    permuted.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dz: (dz[inverse], None, None))

    def minimum(x, logits):
        probabilities = jax.nn.softmax(logits)
        expert = jnp.argmax(probabilities, axis=-1)
        order = jnp.argsort(expert, stable=True)
        inverse = jnp.argsort(order)
        back = permuted(jax.nn.relu(permuted(x, order, inverse)), inverse, order)
        score = jnp.take_along_axis(probabilities, expert[:, None], axis=-1)
        return jnp.sum(score * back * cotangent)

    steps = {f.__name__: jax.jit(jax.value_and_grad(f, argnums=(0, 1))) for f in (library, minimum)}
    return {name: lambda step=step: step(x, logits) for name, step in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    small, large = 4096, 65536
    calls = {"small": (competitor(small), large // small), "large": (competitor(large), 1)}
    seconds = interleaved(
        {name: repeated(*each) for name, each in calls.items()},
        rounds,
        warm={name: call for name, (call, _) in calls.items()},
    )
    for name, tokens in (("small", small), ("large", large)):
        print(f"{tokens:>6} tokens: {quartiles(1e9 * seconds[name] / large)} ns per token")
    print(f"ratio per token, {large} / {small}: {quartiles(seconds['large'] / seconds['small'])}")
    seconds = interleaved({name: repeated(call, 16) for name, call in routed(small).items()}, rounds)
    print(f"routing, dispatch and combine / minimum: {quartiles(seconds['library'] / seconds['minimum'])}")


def repeated(call, times: int):
    """`call`, that many times, each waited for."""

    def run():
        for _ in range(times):
            jax.block_until_ready(call())

    return run


if __name__ == "__main__":
    main()
