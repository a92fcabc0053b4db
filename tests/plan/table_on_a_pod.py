"""Compiles the lookup in a table that the devices of a pod share out by rows, and the update of what was read: prints
what moves and what is kept, as JSON. Run by `test_bars.py` in a process of its own, with the real TPU compiler."""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.base.sharding import BATCH_AXES, MeshConfig
from sparsejax.nn.table import IDS_SPEC, RowGradients, read_tables
from sparsejax.plan.collectives import read_collectives
from sparsejax.plan.topology import described_mesh
from sparsejax.train.row_optimizer import RowAdam
from sparsejax.train.table_step import apply_rows, collect

DATA, EXPERT, TOKENS, ROWS, WIDTH = 4, 4, 512, 2**24, 128


def step(table_LWE: Any, state: Any, ids_BTK: Any) -> Any:
    """Reads, and moves the rows against themselves."""
    rows_ZBTKE, rounds = read_tables(table_LWE, jnp.zeros(1, jnp.int32), ids_BTK, "float32")
    read = RowGradients(ids=ids_BTK[None], layer=jnp.zeros(1, jnp.int32), rows=rows_ZBTKE)
    found = collect(table_LWE, read)
    return apply_rows(RowAdam(), table_LWE, state, read, found, 1 / found.square_sum, found.touched > 0), rounds


def main() -> None:
    devices = DATA * EXPERT
    with described_mesh(f"v5e:{DATA}x{EXPERT}", MeshConfig(data=DATA, expert=EXPERT)) as mesh:
        array = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
        table = array((1, ROWS, WIDTH), "float32", P(None, BATCH_AXES, None))
        state = {"mean": table, "square": table, "updates": array((1, ROWS), "float32", P(None, BATCH_AXES))}
        ids = array((devices, TOKENS, 1), "int32", IDS_SPEC)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, ids).compile()
    memory = compiled.memory_analysis()
    moved = read_collectives(compiled.as_text(), (DATA, EXPERT, 1))
    print(
        json.dumps(
            {
                "moved": [(each.kind, each.once, each.loop_unknown) for each in moved],
                "row_bytes": TOKENS * WIDTH * 4,
                "id_bytes": TOKENS * 4,
                "table_bytes": ROWS * WIDTH * 4 // devices,
                "temporary": memory.temp_size_in_bytes,
                "in_place": memory.alias_size_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
