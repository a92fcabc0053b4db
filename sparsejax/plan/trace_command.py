"""The `trace` command: what a trace says, and what would have been otherwise."""

import argparse
import json
import math
from typing import Any, Optional

from sparsejax.base.errors import ConfigError, RequestError
from sparsejax.base.writers import json_values
from sparsejax.plan.what_if import Question, what_if
from sparsejax.routers.orders import ORDERS
from sparsejax.train.trace import Trace, load_trace

ASKED = ("capacity_factor", "k", "group_size", "order", "devices", "placement")
COLUMNS = (
    "drop_fraction",
    "unserved_fraction",
    "load_max_over_mean",
    "slot_utilisation",
    "devices_per_token",
    "device_load_max_over_mean",
    "bytes_by_pair",
    "bytes_by_device",
    "bytes_of_slots",
)


def trace_command(args: argparse.Namespace) -> int:
    """Prints, for each layer, the ledger and the movement as recorded, and as the flags would have had it."""
    trace = load_trace(args.file)
    question = _question(trace, args)
    recorded = what_if(trace)
    asked = what_if(trace, question) if question != Question() else None
    changed = {name: getattr(args, name) for name in ASKED if getattr(args, name) is not None}
    if args.format == "json":
        found: dict[str, Any] = {"mode": trace.mode, "step": trace.step, "asked": changed, "recorded": recorded}
        print(json.dumps(json_values(found | ({} if asked is None else {"what_if": asked})), allow_nan=False))
        return 0
    print(f"{int(trace.mask.sum()):,} tokens, mode {trace.mode}, step {trace.step}")
    _print_table("as recorded", recorded)
    if asked is not None:
        _print_table("with " + ", ".join(f"{name}={value}" for name, value in changed.items()), asked)
    return 0


def _question(trace: Trace, args: argparse.Namespace) -> Question:
    factor = args.capacity_factor
    if factor is not None and not 0 < factor < math.inf:
        raise RequestError(f"--capacity-factor={factor} is no positive number")
    try:
        order = None if args.order is None else ORDERS[args.order]()
    except ConfigError as error:
        raise RequestError(f"--order: {error.message}") from None
    return Question(
        capacity_factor=factor,
        k=args.k,
        group_size=args.group_size,
        order=order,
        devices=args.devices,
        device_of_expert=args.placement,
    )


def _print_table(title: str, layers: dict[str, dict[str, Any]]) -> None:
    width = max(map(len, COLUMNS))
    print(f"\n{title}")
    print(" " * width + "".join(f"{name:>16}" for name in layers))
    for column in COLUMNS:
        print(f"{column:<{width}}" + "".join(_cell(layer.get(column)) for layer in layers.values()))
    for name, layer in layers.items():
        if "refused" in layer:
            print(f"{name}: {layer['refused']}")


def _cell(value: Optional[float]) -> str:
    """Empty for a layer that cannot answer."""
    if value is None:
        return f"{'–':>16}"
    return f"{value:>16,}" if isinstance(value, int) else f"{value:>16.4f}"
