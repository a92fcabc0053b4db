"""Dense networks whose hidden units are sorted into clusters of equal size: what experts can be cut from (MoEfication,
Zhang et al., arXiv:2110.01786)."""

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import to_numpy
from sparsejax.blocks.moe import MoESpec
from sparsejax.blocks.upcycling import HIDDEN_AXIS
from sparsejax.model.config import ModelConfig
from sparsejax.model.stack import place

ROUNDS = 10
"""Of assigning all units and moving the centres; it ends before when no unit moves."""


def with_clusters(config: ModelConfig, before: ModelConfig, trained: nnx.State) -> nnx.State:
    """The parameters `trained` of a model of `before`, the same function, with the units of every dense network in the
    order of their clusters, where the block in its place has `from_dense = clusters`: one cluster for each expert."""
    flat = dict(nnx.to_flat_state(trained))
    paths = {path: place(path) for path in flat if path[0] == "stack" and path[1] != "pools"}
    for layer, new in zip(before.layers, config.layers, strict=False):  # another depth is refused later
        spec, stored = config.blocks[new.block], before.stored(layer)
        if not isinstance(spec, MoESpec) or spec.from_dense != "clusters":
            continue
        own = {name: path for path, (position, name) in paths.items() if position == layer.position}
        sources = {name: own[source] for name in HIDDEN_AXIS if (source := f"feed_forward/mlp/{name}/weight") in own}
        if before.tied_repeats or not sources:
            raise RequestError(f"layer {layer.name}: clusters are made of the units of a dense network of its own")
        whole = {name: to_numpy(flat[path][...]) for name, path in sources.items()}
        mine = {name: array if stored is None else array[stored] for name, array in whole.items()}
        seen_DF = mine.get("w_gate", mine["w_in"])  # what the activation is applied to
        if seen_DF.shape[1] % spec.num_experts:
            units = f"its {seen_DF.shape[1]} hidden units"
            raise RequestError(f"layer {layer.name}: {units} do not make {spec.num_experts} clusters")
        order_F = balanced_clusters(seen_DF.T, spec.num_experts)
        for name, path in sources.items():
            value = np.take(mine[name], order_F, HIDDEN_AXIS[name])
            if stored is not None:
                stack = whole[name].copy()
                stack[stored] = value
                value = stack
            flat[path] = flat[path].replace(jax.device_put(value, flat[path][...].sharding))
    return nnx.from_flat_state(flat)


def balanced_clusters(points_FD: Float[np.ndarray, "F D"], clusters: int) -> Int[np.ndarray, " F"]:
    """The points' numbers, those of one cluster side by side: k-means of directions whose assignment step gives every
    cluster F / `clusters` points, and is the best that does. A function of the points alone."""
    unit_FD = points_FD / np.maximum(np.linalg.norm(points_FD, axis=1, keepdims=True), 1e-12)
    size = len(unit_FD) // clusters
    centres = unit_FD[np.random.default_rng(0).choice(len(unit_FD), clusters, replace=False)]
    cluster_F = np.full(len(unit_FD), -1)
    for _ in range(ROUNDS):
        cost_FP = np.repeat(cdist(unit_FD, centres, "sqeuclidean"), size, axis=1)
        new_F = linear_sum_assignment(cost_FP)[1] // size
        if (new_F == cluster_F).all():
            break
        cluster_F = new_F
        centres = np.stack([unit_FD[cluster_F == c].mean(0) for c in range(clusters)])
    return np.argsort(cluster_F, kind="stable")
