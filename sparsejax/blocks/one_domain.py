"""The experts of one domain as one dense network: what a task needs of a mixture routed by task (TaskMoE, Kudugunta et
al., arXiv:2110.03742)."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array

from sparsejax.base.errors import RequestError
from sparsejax.blocks.upcycling import HIDDEN_AXIS, Arrays
from sparsejax.routers.candidates import Inputs
from sparsejax.routers.document_logits import DomainLogits
from sparsejax.routers.router import Decision, route
from sparsejax.routers.tables import ByDomain

if TYPE_CHECKING:  # which is a block spec itself
    from sparsejax.blocks.moe import MoESpec


def network_of_domain(trained: Arrays, spec: "MoESpec", domain: int) -> dict[str, Array]:
    """The parameters of a dense block, from those of a mixture of experts that knows no more of a token than its
    domain. The k experts lie side by side along the hidden width, each one's last matrix times its weight; shared
    experts follow.

    Raises `RequestError` when what a token goes to depends on more than its domain."""
    _check(spec)
    pairs = _decision(trained, spec, domain).pairs
    expert_K, weight_K = pairs.expert[0], jnp.where(pairs.valid[0], pairs.weight[0], 0)
    arrays = {name: array for name, array in trained.items() if not name.startswith("feed_forward/")}
    for name, axis in HIDDEN_AXIS.items():
        if f"feed_forward/experts/{name}" not in trained:
            continue
        chosen = trained[f"feed_forward/experts/{name}"][expert_K]
        if name == "w_out":
            chosen = chosen * weight_K[:, None, None]
        parts = [*chosen]
        if spec.shared_experts:
            parts.append(trained[f"feed_forward/shared/{name}/weight"])
        arrays[f"feed_forward/mlp/{name}/weight"] = jnp.concatenate(parts, axis)
    return arrays


def _check(spec: "MoESpec") -> None:
    router = spec.router
    traits = router.selection.traits
    of_token = traits.fixed or traits.train_only or traits.fits or traits.together or traits.reinforce is not None
    if router.learned and not isinstance(router.logits, DomainLogits):
        raise RequestError("its experts are not chosen by the domain alone: router.logits must be by_domain")
    if of_token and not isinstance(router.selection, ByDomain):
        raise RequestError("its router.selection does not give a token the experts of its domain")
    if router.controller.rows or router.residual:
        raise RequestError("its experts change with more than the domain, by router.controller or router.residual")
    if spec.pooled or spec.free.total or spec.mixes or spec.gates_shared:
        raise RequestError("pooled, free or mixed experts do not make a dense network")


def _decision(trained: Arrays, spec: "MoESpec", domain: int) -> Decision:
    """For one token of the domain, as in generation."""
    prefix = "feed_forward/router/"
    parameters = {name.removeprefix(prefix): array for name, array in trained.items() if name.startswith(prefix)}
    zeros = jnp.zeros((1, 1), jnp.int32)
    inputs = Inputs(
        mask=jnp.ones((1, 1), bool),
        tokens=zeros,
        previous=zeros - 1,
        domains=zeros + domain,
        positions=zeros,
        limit=jnp.ones(1, jnp.int32),
        num_slots=1,
        training=False,
        generating=True,
    )
    width = trained["feed_forward/experts/w_in"].shape[1]
    return route(jnp.zeros((1, 1, width)), parameters, inputs, spec.router, spec.scored_experts)
