"""Tables and units, as the plan writes them."""

from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNWRAPPED = 10_000
"""Columns of an output that is no terminal."""


def print_tables(tables: Iterable[tuple[str, Table]], file: TextIO, notes: Sequence[str] = ()) -> None:
    """Writes tables below their titles, without those that are empty, then notes."""
    console = Console(file=file, width=None if file.isatty() else UNWRAPPED, highlight=False, soft_wrap=False)
    for title, table in tables:
        if table.row_count:
            console.print(Text(title, style="bold"))
            console.print(table)
            console.print()
    for note in notes:
        console.print(Text(f"- {note}"))


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
