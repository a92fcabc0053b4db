"""What deciding costs: each selection's share of a layer, from the tokens' vectors to slots and weights.

Run:  python benchmarks/decision.py [--rounds=25]

Forward, float32, one group. Selections take turns with value and gradient of the experts' products at capacity factor
1.0 (row 1 of `moe_layer.py`: 4096 tokens, d = 512, hidden = 1024, E = 8, k = 1); `balanced_assignment` with those of
64 experts, on Gaussian scores, and its score is compared with SciPy's optimum. A figure is the median over rounds of
decision / experts. Needs SciPy (`pip install -e '.[dev]'`)."""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from sparsejax.ops.ffn import expert_ffn
from sparsejax.routers.candidates import Inputs, Noise
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.expert_choice import ExpertChoice
from sparsejax.routers.lots import Lots
from sparsejax.routers.plans import BalancedAssignment, Sinkhorn
from sparsejax.routers.policy import Policy, Random
from sparsejax.routers.router import route
from sparsejax.routers.scores import Relu
from sparsejax.routers.tables import Hash
from sparsejax.routers.top_k import Positive, Prototypes, SecondExpert, TopK, TopP
from sparsejax.routers.weights import Raw
from sparsejax.train.timing import interleaved

from timing import quartiles

TOKENS, WIDTH, HIDDEN = 4096, 512, 1024
ROUTER = RouterConfig(selection=TopK(k=1), weight=Raw(), allow_leak=True)
SELECTIONS: dict[str, Any] = {
    "top_k, k = 1": TopK(k=1),
    "top_k, k = 2": TopK(k=2),
    "second_expert": SecondExpert(policy="threshold"),
    "prototypes": Prototypes(k=2),
    "top_p": TopP(k=4),
    "hash": Hash(k=1),
    "expert_choice": ExpertChoice(k=1),
    "expert_choice, at most 2, 100 iterations": ExpertChoice(k=1, cap=2, iterations=100),
    "positive": Positive(k=1),
    "policy": Policy(),
    "random": Random(),
    "sinkhorn, 8 iterations": Sinkhorn(k=1, iterations=8),
}


def decision(selection, num_experts: int):
    """A call that decides once."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (1, TOKENS, WIDTH))
    weight = jax.random.normal(keys[1], (WIDTH, num_experts)) * WIDTH**-0.5
    slots = TOKENS * selection.experts_per_token // num_experts
    ids = jnp.arange(TOKENS, dtype=jnp.int32)[None]
    inputs = Inputs(
        mask=jnp.ones((1, TOKENS), bool),
        tokens=ids % 256,
        previous=ids % 256,
        positions=ids,
        domains=ids * 0,
        limit=jnp.full(1, slots, jnp.int32),
        num_slots=slots,
        training=True,
        noise=Noise(keys_B=keys[:1], row_length=TOKENS, groups=(1, TOKENS)),
        lots=Lots(**dict.fromkeys(("shared", "document", "token"), ids.astype(jnp.uint32))),
    )
    router = dataclasses.replace(ROUTER, selection=selection, score=Relu() if selection.traits.sparse else ROUTER.score)
    learned = router.init(keys[1], WIDTH, num_experts)
    parameters = {name: parameter[...] for name, parameter in learned.items()} | {"weight": weight}

    @jax.jit
    def decide(x, parameters):
        decided = route(x, parameters, inputs, router, num_experts)
        return decided.pairs, decided.slots, decided.logits_GSE

    return lambda: decide(x, parameters)


def experts(num_experts: int):
    """A call of the experts alone: value and gradient in weights and input."""
    keys = jax.random.split(jax.random.key(1), 3)
    w_in = jax.random.normal(keys[0], (num_experts, WIDTH, HIDDEN)) * WIDTH**-0.5
    w_out = jax.random.normal(keys[1], (num_experts, HIDDEN, WIDTH)) * HIDDEN**-0.5
    z = jax.random.normal(keys[2], (num_experts, TOKENS // num_experts, WIDTH))
    step = jax.jit(jax.value_and_grad(lambda weights, z: jnp.sum(expert_ffn(z, weights, "gelu") * z), argnums=(0, 1)))
    return lambda: step((w_in, w_out), z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    show({name: decision(selection, 8) for name, selection in SELECTIONS.items()}, experts(8), rounds)
    balanced = decision(BalancedAssignment(precision=0.02), 64)
    show({"balanced_assignment, ε = range / 50": balanced}, experts(64), rounds)
    print(f"    its score, below the optimum by {short_of_optimum(balanced):.3f} of the bound T · ε")


def short_of_optimum(balanced) -> float:
    """(best score − score) / (T · ε), with SciPy's assignment of tokens to slots."""
    pairs, _, logits = (jax.tree.map(np.asarray, part) for part in balanced())
    scores = logits[0].astype(np.float64)
    slots = np.repeat(scores, TOKENS // scores.shape[1], axis=1)
    best = slots[linear_sum_assignment(slots, maximize=True)].sum()
    found = scores[pairs.token[0], pairs.expert[0]][pairs.valid[0]].sum()
    return (best - found) / (TOKENS * 0.02 * (scores.max() - scores.min()))


def show(decisions, layer, rounds: int) -> None:
    seconds = interleaved(decisions | {"experts": layer}, rounds)
    for name in decisions:
        print(f"{name:<40}{1e3 * np.median(seconds[name]):>8.1f} ms   {quartiles(seconds[name] / seconds['experts'])}")


if __name__ == "__main__":
    main()
