"""Does moving tokens scale? Dispatch and combine, per token, at 4k and at 64k tokens in one group.

Run:  python benchmarks/dispatch.py [--rounds=25]

Slots, dispatch and combine, with the gradient with respect to tokens and weights; float32, d = 512, E = 8, k = 1,
capacity factor 1.0. The sizes take turns, sixteen calls with 4k tokens and one with 64k, after one uncounted call each
(the other size has just taken their memory); the figure is the median over rounds of the ratio of time per token."""

import argparse

import jax
import jax.numpy as jnp

from sparsejax.ops.assignment import choice_major_pairs, fill_slots
from sparsejax.ops.capacity import capacity
from sparsejax.ops.dispatch import MOVEMENTS

from timing import interleaved, quartiles

WIDTH, EXPERTS, K = 512, 8, 1


def competitor(tokens: int):
    """A call that dispatches and combines `tokens` tokens, forward and backward."""
    keys = jax.random.split(jax.random.key(0), 4)
    experts = jax.random.randint(keys[0], (1, tokens, K), 0, EXPERTS)
    x, cotangent = (jax.random.normal(key, (1, tokens, WIDTH)) for key in keys[1:3])
    weights = jax.random.uniform(keys[3], (1, tokens, K))
    slots_each = capacity(tokens, EXPERTS, K, 1.0, "per_choice")
    movement = MOVEMENTS["gather"]

    def moved(x, weights, experts):
        pairs = choice_major_pairs(experts, weights, jnp.ones((1, tokens), bool))
        slots = fill_slots(pairs, EXPERTS, slots_each, jnp.full(1, slots_each, jnp.int32))
        return jnp.sum(movement.combine(movement.dispatch(x, pairs, slots), pairs, slots) * cotangent)

    step = jax.jit(jax.value_and_grad(moved, argnums=(0, 1)))
    return lambda: step(x, weights, experts)


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


def repeated(call, times: int):
    """`call`, that many times, each waited for."""

    def run():
        for _ in range(times):
            jax.block_until_ready(call())

    return run


if __name__ == "__main__":
    main()
