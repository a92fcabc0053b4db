"""A block that begins with what another run's block has learned: copied, or as a mixture of copies of its dense
network (sparse upcycling, Komatsuzaki et al., arXiv:2212.05055; granular: He et al., arXiv:2410.07524)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparsejax.base.errors import RequestError
from sparsejax.base.shapes import form
from sparsejax.routers.candidates import Inputs
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.lots import Lots
from sparsejax.routers.router import decide

Arrays = Mapping[str, Array]
"""A block's parameters by path, such as `feed_forward/experts/w_in`."""

HIDDEN_AXIS = {"w_in": 1, "w_gate": 1, "w_out": 0}
"""Of a dense network's matrices, the axis along which it is cut into shards."""


def copied(fresh: Arrays, trained: Arrays) -> dict[str, Array]:
    """The arrays of `trained` under the names of `fresh`. Raises `RequestError` unless they are the same ones."""
    problems = [f"it lacks {name} {form(array)}" for name, array in fresh.items() if name not in trained]
    problems += [
        f"its {name} is {form(trained[name])}, not {form(array)}"
        for name, array in fresh.items()
        if name in trained and trained[name].shape != array.shape
    ]
    problems += [f"its {name} {form(array)} has no place" for name, array in trained.items() if name not in fresh]
    if problems:
        raise RequestError(problems[0])
    return {name: trained[name] for name in fresh}


def mixture_of_copies(fresh: Arrays, trained: Arrays, router: RouterConfig, scored_experts: int) -> dict[str, Array]:
    """The parameters of a mixture-of-experts block from those of a dense one.

    With experts of the dense width every expert is a copy. With experts m times narrower, expert e holds shard e mod m
    of the hidden width, and the router's columns are the same within each m neighbours (a virtual group), so that with
    a k that m divides, top-k takes whole copies. Then the output of a token is Σ weights / m times the dense one, which
    the last matrix makes up for (`rescale`); the paper spreads the factor over all matrices, which is exact only for
    activations that scale with their argument.

    Router and shared experts have no counterpart in a dense block and keep their fresh values.
    """
    outside = lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("feed_forward/")}  # noqa: E731
    sources = {f"feed_forward/experts/{name}": f"feed_forward/mlp/{name}/weight" for name in HIDDEN_AXIS}
    sources = {name: source for name, source in sources.items() if name in fresh}
    others = [name for name in trained if name.startswith("feed_forward/") and name not in sources.values()]
    if others:
        raise RequestError(f"its {others[0]} {form(trained[others[0]])} has no place")
    shards = {name: _shards(name, fresh[name], source, trained) for name, source in sources.items()}
    m, num_experts = shards["feed_forward/experts/w_in"].shape[0], fresh["feed_forward/experts/w_in"].shape[0]
    experts = {name: jnp.tile(each, (num_experts // m, 1, 1)) for name, each in shards.items()}
    experts["feed_forward/experts/w_out"] *= rescale(router, scored_experts, m)
    routers = {name: array for name, array in fresh.items() if name.startswith("feed_forward/router")}
    grouped = {name: _virtual_groups(array, num_experts, scored_experts, m) for name, array in routers.items()}
    return {**fresh, **copied(outside(fresh), outside(trained)), **experts, **grouped}


def mixture_of_clusters(fresh: Arrays, trained: Arrays) -> dict[str, Array]:
    """The parameters of a mixture-of-experts block whose experts are the hidden units of a dense network, each of them
    in one expert, in their order (MoEfication, arXiv:2110.01786). A linear router's column is the mean of what its
    expert's units are the scalar products with, so that it tells how strong they are together."""
    router = "feed_forward/router/weight"
    if [name for name in fresh if name.startswith("feed_forward/router/")] != [router]:
        raise RequestError("clusters need the router of logits=linear, without learned noise or a residual")
    shards = {}
    for name in HIDDEN_AXIS:
        if f"feed_forward/experts/{name}" in fresh:
            expert = fresh[f"feed_forward/experts/{name}"]
            shards[name] = _shards(name, expert, f"feed_forward/mlp/{name}/weight", trained)
            if len(shards[name]) != len(expert):
                raise RequestError(f"clusters are experts of a part of the width, and {name} has {form(expert)}")
    outside = lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("feed_forward/")}  # noqa: E731
    seen_EDF = shards.get("w_gate", shards["w_in"])
    columns_DE = seen_EDF.mean(-1).T
    if columns_DE.shape != fresh[router].shape:
        raise RequestError("experts without a network are no clusters of one")
    experts = {f"feed_forward/experts/{name}": each for name, each in shards.items()}
    return {**fresh, **copied(outside(fresh), outside(trained)), **experts, router: columns_DE}


def rescale(router: RouterConfig, num_experts: int, shards: int) -> float:
    """What the output of `shards` shards is multiplied with to be that of the whole: shards / (the sum of a token's
    weights under a router of equal logits). 1 for whole copies with renormalised weights."""
    ones = np.ones((1, num_experts), bool)
    zeros = jnp.zeros((1, num_experts), jnp.int32)
    lots = zeros.astype(jnp.uint32)
    with jax.ensure_compile_time_eval():
        inputs = Inputs(
            mask=jnp.asarray(ones),
            tokens=zeros,
            previous=zeros,
            positions=zeros,
            domains=zeros,
            limit=jnp.full(1, num_experts, jnp.int32),
            num_slots=num_experts,
            training=False,
            generating=True,
            lots=Lots(shared=lots, document=lots, token=lots),
        )
        decision = decide(jnp.zeros((1, num_experts, num_experts)), inputs, router)
        total = float(jnp.where(decision.slots.keep, decision.pairs.weight, 0).sum()) / num_experts
    return shards / total if total > 0 else float(shards)


def _shards(name: str, expert, source: str, trained: Arrays):
    """The dense matrix cut into m shards of the width of an expert, `[m, …]`."""
    if source not in trained:
        raise RequestError(f"it lacks {source}, of which {name} {form(expert)} would be made")
    dense, axis = trained[source], HIDDEN_AXIS[name.rpartition("/")[2]]
    num_experts, width = expert.shape[0], expert.shape[1 + axis]
    m = max(1, dense.shape[axis] // width)
    whole = list(expert.shape[1:])
    whole[axis] = m * width
    if list(dense.shape) != whole or num_experts % m:
        raise RequestError(
            f"its {source} {form(dense)} does not make {name} {form(expert)}: the width of an expert must be that of "
            "the dense network, divided by a divisor of the number of experts"
        )
    return jnp.stack(jnp.split(dense, m, axis=axis))


def _virtual_groups(array, num_experts: int, scored_experts: int, m: int):
    """Every m-th column, m times over, of a router's array that has one for each expert; those of experts without a
    network stay."""
    if array.ndim == 0 or array.shape[-1] != scored_experts:
        return array
    with_network = jnp.repeat(array[..., : num_experts // m], m, axis=-1)
    return jnp.concatenate([with_network, array[..., num_experts:]], axis=-1)
