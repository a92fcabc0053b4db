"""What tests of layers, models and steps share: meshes, batches, parameters on a mesh, comparison."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES, MeshConfig, Rules, make_mesh
from sparsejax.base.structs import Batch
from sparsejax.blocks.context import Context
from sparsejax.blocks.moe import MoELayer, MoESpec
from sparsejax.blocks.spec import BlockSpec
from sparsejax.nn.backbone import Backbone
from sparsejax.routers import presets
from sparsejax.routers.candidates import Candidates, Inputs
from sparsejax.routers.config import RouterConfig
from sparsejax.routers.lots import Lots
from sparsejax.routers.selectors import TopK
from sparsejax.routers.weights import Raw
from sparsejax.train.state import variable_specs

FREE = ("zero_experts", "copy_experts", "constant_experts")
SHAPES = ("num_experts", "d_ff", "gated", "shared_experts", "mix_shared", "shared_gate", "replicated", *FREE)
"""Fields of `MoESpec` that the shapes of its parameters, or their places on a mesh, depend on."""
ONE_DEVICE = (1, 1, 1)
MESHES = (ONE_DEVICE, (2, 4, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneLayer(Backbone):
    """The dimensions of a layer that is tested alone."""

    num_layers: int = 1


def mesh_name(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


@contextlib.contextmanager
def on_mesh(shape: tuple[int, int, int]) -> Iterator[jax.sharding.Mesh]:
    """The mesh of this shape, set."""
    mesh = make_mesh(MeshConfig(data=shape[0], expert=shape[1], tensor=shape[2]))
    with jax.set_mesh(mesh):
        yield mesh


def host_batch(
    rows: int, length: int, vocab: int = 32, *, documents: int = 2, padded: int = 3, seed: int = 0
) -> dict[str, np.ndarray]:
    """The fields of `Batch`: `documents` documents a row, and the last row ends in `padded` positions of padding."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length + 1)).astype(np.int32)
    document = np.tile(np.arange(length) * documents // length, (rows, 1)).astype(np.int32)
    starts = np.stack([np.searchsorted(row, row) for row in document]).astype(np.int32)
    real = np.ones((rows, length), bool)
    real[-1, length - padded :] = False
    same_document = np.concatenate([document[:, 1:] == document[:, :-1], np.zeros((rows, 1), bool)], axis=1)
    return {
        "tokens": np.where(real, tokens[:, :-1], 0),
        "targets": np.where(real, tokens[:, 1:], 0),
        "segments": np.where(real, document + 1, 0),
        "positions": np.where(real, np.arange(length, dtype=np.int32) - starts, 0),
        "loss_mask": real & same_document,
        "domains": np.zeros((rows, length), np.int32),
        "rows": np.arange(rows, dtype=np.int32),
    }


def put_batch(arrays: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> Batch:
    return Batch(**{name: put_rows(array, mesh) for name, array in arrays.items()})


def put_rows(array: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """An array whose first axis is rows, split over the batch axes."""
    return jax.device_put(array, NamedSharding(mesh, P(BATCH_AXES, *[None] * (array.ndim - 1))))


def host_params(build: Callable[[jax.Array], nnx.Module], seed: int = 0) -> nnx.State:
    """The variables of the module as NumPy arrays, made on one device."""
    with on_mesh(ONE_DEVICE):
        return to_numpy(jax.jit(lambda key: nnx.split(build(key))[1])(jax.random.key(seed)))


def graph_of(build: Callable[[jax.Array], nnx.Module]) -> nnx.GraphDef:
    """The module without its values. Needs the mesh to be set."""
    return nnx.split(jax.eval_shape(build, jax.random.key(0)))[0]


def put_params(params: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """Host variables on the mesh, split as the default rules say."""
    specs = jax.tree.leaves(variable_specs(params, Rules()), is_leaf=lambda leaf: isinstance(leaf, P))
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(leaves, specs, strict=True))


def to_numpy(tree: Any) -> Any:
    """Finished arrays on the host. Waiting also keeps collectives from overlapping: virtual devices would deadlock."""
    return jax.tree.map(np.asarray, jax.block_until_ready(tree))


def assert_close(actual: Any, desired: Any, tolerance: float = 1e-5, atol: float = 0.0) -> None:
    """Structures, dtypes, integers equal; floats, per tensor, max |Δ| ≤ tolerance · max |desired| + atol."""
    actual, desired = to_numpy(actual), to_numpy(desired)
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    wrong = []
    for (path, a), d in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True):
        name = jax.tree_util.keystr(path)
        assert a.shape == d.shape and a.dtype == d.dtype, f"{name}: {a.dtype}{a.shape} is not {d.dtype}{d.shape}"
        if not np.issubdtype(a.dtype, np.floating):
            if not np.array_equal(a, d):
                wrong.append(f"{name}: {a} != {d}")
        elif d.size:
            difference, bound = np.abs(a - d).max(), tolerance * np.abs(d).max() + atol
            if not difference <= bound:
                wrong.append(f"{name}: max |Δ| = {difference:.3g} > {bound:.3g}")
    assert not wrong, "\n".join(wrong)


def known(mask: np.ndarray, num_slots: int = 1, limit: int | None = None, **more: Any) -> Inputs:
    """What a router knows of groups of tokens with this mask `[G, S]`, in training."""
    mask = jnp.asarray(mask)
    given: dict[str, Any] = dict.fromkeys(("tokens", "previous", "domains"), jnp.zeros(mask.shape, jnp.int32))
    given["positions"] = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
    lots = given["positions"].astype(jnp.uint32)
    given["lots"] = Lots(shared=0 * lots, document=0 * lots, token=lots)
    limits = jnp.full(mask.shape[0], num_slots if limit is None else limit, jnp.int32)
    return Inputs(mask=mask, limit=limits, num_slots=num_slots, **({"training": True} | given | more))


def candidates(scores: Any, mask: np.ndarray | None = None, **more: Any) -> Candidates:
    """Experts to choose from by their scores `[G, S, E]`."""
    scores = jnp.asarray(scores, jnp.float32)
    mask = np.ones(scores.shape[:2], bool) if mask is None else mask
    ranking = jax.lax.stop_gradient(scores)
    return Candidates(scores=scores, ranking=ranking, logits=ranking, inputs=known(mask, **more))


@functools.cache
def moe_layer_params(spec: MoESpec, backbone: Backbone, seed: int = 0) -> nnx.State:
    """Host parameters of one MoE layer; settings without parameters do not change them."""
    with_variables = ("logits", "noise", "controller", "residual")
    keeps = {axis: getattr(spec.router, axis) for axis in with_variables}
    traits = spec.router.selection.traits
    asked = traits.sparse or traits.thresholds or traits.reinforce  # a controller may ask for it, or it learns itself
    one = RouterConfig(selection=spec.router.selection if asked else TopK(k=1), weight=Raw(), allow_leak=True, **keeps)
    one = one if spec.router.learned else presets.hash()
    shaped = MoESpec(**{name: getattr(spec, name) for name in SHAPES}, router=one)
    if spec != shaped:
        return moe_layer_params(shaped, backbone, seed)
    return host_params(lambda key: MoELayer(key, backbone, spec), seed)


def moe_layer_runner(spec: MoESpec, backbone: Backbone, shape: tuple[int, int, int]) -> Callable[..., Any]:
    """`layer_runner` of one MoE layer."""
    return layer_runner(MoELayer, spec, backbone, shape)


@functools.cache
def layer_runner(
    layer: Callable[..., nnx.Module], spec: BlockSpec, backbone: Backbone, shape: tuple[int, int, int]
) -> Callable[..., Any]:
    """`run(params, x, fields of a batch, key=None, mode='train') -> (y, report)` of one layer, host to host."""
    with on_mesh(shape):
        graph = graph_of(lambda key: layer(key, backbone, spec))

    @functools.partial(jax.jit, static_argnames="mode")
    def call(params, x, batch, key, mode):
        return nnx.merge(graph, params)(x, Context(batch=batch, mode=mode, key=key))

    def run(params, x, arrays, key=None, mode="train"):
        with on_mesh(shape) as mesh:
            return to_numpy(call(put_params(params, mesh), put_rows(x, mesh), put_batch(arrays, mesh), key, mode))

    run.call = call
    return run


def told_by(*words: str) -> Any:
    """The JSON on the last line of a Python process of its own, which compiles for TPU as users do."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
