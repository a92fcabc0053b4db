"""Tables and units, as the plan writes them."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text


def rows_of(texts: Sequence[str], numbers: Sequence[str], rows: Any) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for header in texts:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def mesh_name(mesh: Sequence[int]) -> str:
    return "×".join(map(str, mesh))


def flops(count: float) -> str:
    """'2.30 MFLOP'; '0' for none."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def bytes_(count: float) -> str:
    """'40.6 MiB'; '0' for none."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def seconds(count: float) -> str:
    """'3.1 ms'."""
    return f"{count:.3g} s" if count >= 1 else f"{1e3 * count:.3g} ms"


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    if count == 0:
        return "0"
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:.3g} {units[power]}" if count < 1000 else f"{count:.0f} {units[power]}"
