"""A plan as tables: fitted to a terminal, and anywhere else plain aligned columns that are never cut or wrapped."""

from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsejax.plan.estimate import Plan
from sparsejax.plan.layout import Layout
from sparsejax.plan.pod import CompiledStep
from sparsejax.plan.work import Work

UNWRAPPED = 10_000
"""Columns of an output that is no terminal."""


def print_plan(plan: Plan, compiled: Sequence[CompiledStep], file: TextIO) -> None:
    """Writes every table of `plan`, and of what was compiled, to `file`."""
    console = Console(file=file, width=None if file.isatty() else UNWRAPPED, highlight=False, soft_wrap=False)
    for title, table in (*_tables(plan), *_compiled(compiled)):
        if table.row_count:
            console.print(Text(title, style="bold"))
            console.print(table)
            console.print()
    for note in plan.notes:
        console.print(Text(f"- {note}"))


def _tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    yield "Parameters, and FLOPs per token", _components(plan.work)
    step = f"{plan.tokens_per_step:,} tokens, {flops(plan.flops_per_step)} a step"
    yield f"Bytes per device, by mesh (data × expert × tensor); {step}", _bytes(plan.layouts)
    yield "Slots of the experts; FLOPs per token and layer, forward", _slots(plan)
    yield "Routers", _routers(plan.work)
    yield "Unused settings", _rows(("setting", "why"), [], plan.unused.items())
    yield "Tensors: logical axes, the mesh axes that split them, and bytes per device", _tensors(plan.layouts)


def _compiled(steps: Sequence[CompiledStep]) -> Iterator[tuple[str, Table]]:
    for step in steps:
        name = f"{step.topology}, {mesh_name(step)}"
        sizes = [(kind, bytes_(getattr(step, kind))) for kind in ("arguments", "temporaries", "others", "total")]
        if step.memory is not None:
            left = step.memory - step.total
            sizes.append(("memory of a device", bytes_(step.memory)))
            sizes.append(("left", bytes_(left) if left >= 0 else f"{bytes_(-left)} TOO LITTLE"))
        yield f"Compiled for {name} in {step.seconds:.0f} s: bytes per device", _rows(("class",), ("bytes",), sizes)
        rows = [
            (each.kind, "+".join(each.axes) or "-", str(each.count), bytes_(each.bytes), "; ".join(each.scopes))
            for each in step.traffic
        ]
        note = "; loops of unknown length count once" if step.loop_unknown else ""
        yield (
            f"What a device sends in a step on {name}{note}",
            _rows(("collective", "mesh axes", "count", "bytes", "most of it from"), (), rows),
        )


def _components(work: Work) -> Table:
    of, rows = work.flops_per_token, []
    for part in work.components:
        rows.append((part.name, f"{part.parameters:,}", f"{part.active:,}", flops(part.forward), flops(part.training)))
    rows.append(("total", f"{work.parameters:,}", f"{work.active:,}", flops(of["forward"]), flops(of["training"])))
    rows.append(("  with every slot computed", "", "", flops(of["forward_padded"]), flops(of["training_padded"])))
    return _rows(("component",), ("parameters", "active", "forward", "training"), rows)


def _bytes(layouts: Sequence[Layout]) -> Table:
    first = layouts[0]
    rows = [(kind, *(bytes_(each.bytes_per_device[kind]) for each in layouts)) for kind in first.bytes_per_device]
    rows += [(f"estimate: {name}", *(bytes_(each.estimates[name]) for each in layouts)) for name in first.estimates]
    if len(layouts) == 1:
        rows += [(f"  saved {kind}", bytes_(size)) for kind, size in first.saved_largest.items()]
    return _rows(("class",), [mesh_name(each) for each in layouts], rows)


def _slots(plan: Plan) -> Table:
    rows = []
    for row in plan.work.slots:
        groups = "/".join(str(each.groups_per_device[row.block]) for each in plan.layouts)
        selected = (str(len(row.layers)), str(row.num_experts), str(row.experts_per_token), f"{row.capacity_factor:g}")
        given = (str(row.group_size), groups, str(row.slots_per_expert), f"{row.slots_per_token:.4g}")
        ratio = row.padded_flops / row.ideal_flops
        work = (flops(row.ideal_flops), flops(row.padded_flops), f"{ratio:.3f}", flops(row.movement_flops))
        rows.append((row.block, row.mode, *selected, *given, *work))
    counts = ("layers", "experts", "k", "capacity factor", "group size", "groups/device", "slots/expert", "slots/token")
    return _rows(("block", "mode"), (*counts, "ideal", "padded", "padded/ideal", "movement"), rows)


def _routers(work: Work) -> Table:
    """An axis a row, a block a column; an axis that only another block has is '-'."""
    axes = dict.fromkeys(axis for router in work.routers for axis in router.axes)
    rows = [(axis, *(str(r.axes[axis]) if axis in r.axes else "-" for r in work.routers)) for axis in axes]
    if rows:
        rows.append(("layers", *(", ".join(router.layers) for router in work.routers)))
    return _rows(("axis", *(router.block for router in work.routers)), (), rows)


def _tensors(layouts: Sequence[Layout]) -> Table:
    rows = []
    for tensor, *others in zip(*(each.tensors for each in layouts), strict=True):
        axes = "" if tensor.axes is None else _dimensions(tensor.axes)
        sizes = (bytes_(each.bytes_per_device) for each in (tensor, *others))
        shape = f"{tensor.dtype}[{','.join(map(str, tensor.shape))}]"
        rows.append((tensor.name, shape, axes, _dimensions(tensor.spec), *sizes))
    return _rows(("tensor", "type", "axes", "split"), [mesh_name(each) for each in layouts], rows)


def _dimensions(names: Sequence[Any]) -> str:
    return " ".join("-" if name is None else "+".join(name) if isinstance(name, tuple) else name for name in names)


def _rows(texts: Sequence[str], numbers: Sequence[str], rows: Any) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for header in texts:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def mesh_name(layout: Layout | CompiledStep) -> str:
    return "×".join(map(str, layout.mesh))


def flops(count: float) -> str:
    """'2.30 MFLOP'; '0' for none."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def bytes_(count: float) -> str:
    """'40.6 MiB'; '0' for none."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    if count == 0:
        return "0"
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:.3g} {units[power]}" if count < 1000 else f"{count:.0f} {units[power]}"
