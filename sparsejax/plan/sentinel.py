"""What should not be in a layout or in a compiled step, each with its bytes on a device and its likely cause."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import jax

from sparsejax.base.sharding import AXES, RULE_NAMES
from sparsejax.plan.abstract import abstract_batch, abstract_mesh
from sparsejax.plan.activations import residuals
from sparsejax.plan.collectives import Collective
from sparsejax.plan.hlo import module_of
from sparsejax.plan.layout import Layout
from sparsejax.plan.live import Buffer
from sparsejax.plan.products import Dot
from sparsejax.plan.traffic import EXCHANGE, purpose_of
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.state import abstract_state, make_optimizer

LARGE = 0.01
"""The part of a device's memory from which a tensor that lies on several devices is worth a word."""

DENSE = 2.0
"""Experts that compute more than this, over what their rows ask for, do not compute them expert by expert."""

SMALL = 2**20
"""Bytes of a gather that may hold counts, but no weights."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    kind: str
    what: str
    bytes: int
    cause: str


def replicated(layout: Layout, memory: int) -> Iterator[Finding]:
    """Large tensors of the state of which devices along an axis of the mesh hold the same numbers."""
    for tensor in layout.tensors:
        axes = _unused(tensor.spec, layout.mesh)
        copies = math.prod(layout.mesh[AXES.index(axis)] for axis in axes)
        if copies > 1 and tensor.bytes_per_device >= LARGE * memory:
            logical = f"its logical axes are {_words(tensor.axes)}" if tensor.axes else "it lies as its parameter does"
            yield Finding(
                kind="replicated tensor",
                what=f"{tensor.name} along {'+'.join(axes)}",
                bytes=round(tensor.bytes_per_device * (1 - 1 / copies)),
                cause=f"{logical}, and config.mesh.rules maps none of them to {' or '.join(axes)}",
            )


def _unused(spec: Sequence[object], mesh: tuple[int, ...]) -> list[str]:
    used = {name for part in spec for name in (part if isinstance(part, tuple) else (part,))}
    return [axis for axis, size in zip(AXES, mesh, strict=True) if size > 1 and axis not in used]


def _words(axes: Sequence[Optional[str]]) -> str:
    return ", ".join("-" if axis is None else axis for axis in axes)


def idle_rules(config: ExperimentConfig, layout: Layout) -> Iterator[Finding]:
    """Logical axes that are to be split and of which no parameter is."""
    parameters = [tensor for tensor in layout.tensors if tensor.axes is not None]
    for name in RULE_NAMES:
        axis = getattr(config.mesh.rules, name)
        if axis is None or getattr(config.mesh, axis) == 1:
            continue
        those = [t for t in parameters if name in (t.axes or ())]
        if not any(axis in _mesh_axes(t.spec) for t in those):
            yield Finding(
                kind="idle logical axis",
                what=f"config.mesh.rules.{name}={axis} splits no parameter",
                bytes=sum(tensor.bytes_per_device for tensor in those),
                cause=f"no layer of this model has a parameter with the axis {name!r}"
                if not those
                else f"the layout leaves {those[0].name} whole",
            )


def _mesh_axes(spec: Sequence[object]) -> set[object]:
    return {name for part in spec for name in (part if isinstance(part, tuple) else (part,))}


def idle_mesh_axes(mesh: tuple[int, ...], used: set[str], saved: int) -> Iterator[Finding]:
    """Axes of the mesh along which all devices compute the same. `used`: those that split an activation; `saved`: bytes
    of all activations on a device."""
    for axis, size in zip(AXES, mesh, strict=True):
        if size > 1 and axis not in used:
            yield Finding(
                kind="idle mesh axis",
                what=f"mesh.{axis}={size} splits no activation",
                bytes=round(saved * (1 - 1 / size)),
                cause=f"{size} devices along it compute the same; give them to another axis",
            )


def activation_axes(config: ExperimentConfig) -> set[str]:
    """The axes of the mesh that split what a forward pass keeps, if nothing is computed again."""
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none", remat_names=()))
    mesh = abstract_mesh(config.mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract_state(whole, make_optimizer(whole), mesh)
        types = residuals(whole, state, abstract_batch(whole, mesh))
    return {str(axis) for each in types for axis in _mesh_axes(each.sharding.spec) if axis is not None}


def gathered_experts(found: Sequence[Collective]) -> Iterator[Finding]:
    """Gathers over the axes that experts and hidden widths are split along, which no layer needs."""
    for each in found:
        over = set(each.axes or ()) & {"expert", "tensor"}
        if each.kind == "all-gather" and over and each.once >= SMALL and purpose_of(each) != EXCHANGE:
            yield Finding(
                kind="gather of experts or tables",
                what=f"all-gather along {'+'.join(each.axes or ())} in {module_of(each.scope)}",
                bytes=each.bytes,
                cause=f"an operation there needs whole what lies split over {' and '.join(sorted(over))}",
            )


def dense_fallback(dots: Sequence[Dot], asked: float, held: Sequence[Buffer]) -> Iterator[Finding]:
    """Experts that compute rows that are not theirs. `asked`: FLOPs of a device for the rows that its experts have."""
    computed = sum(dot.flops for dot in dots if "/experts/" in dot.scope)
    if asked and computed > DENSE * asked:
        largest = max((each.bytes for each in held if "/experts/" in each.scope), default=0)
        yield Finding(
            kind="dense fallback",
            what=f"experts compute {computed / asked:.1f} × the FLOPs of their rows",
            bytes=largest,
            cause="this compiler turns a grouped product into one dense product for each expert; "
            "try config.model.blocks.NAME.grouped_matmul=megablox (TPU) or dispatch=gather",
        )
