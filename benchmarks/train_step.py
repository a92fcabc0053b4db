"""What the framework adds to a step: the training loop as it runs, against its bare jitted step on the same batch.

Run:  python benchmarks/train_step.py [--config=configs/quickstart.py] [--blocks=12]

The loop trains as ever: it waits for data, places the batch, counts, writes rows. After every block of its steps, the
bare step runs as often on the block's last batch and a copy of the state. Evaluation and checkpoints are switched off.
The figure is the median, with quartiles, over blocks of the loop's seconds / the bare step's; a block has a row of
metrics in it. Beside it, the share of the loop's time that went into waiting for data."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.base.config import load
from sparsejax.base.devices import prepare_devices
from sparsejax.train import loop
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.step import make_train_step

from timing import quartiles

BLOCK = 10  # steps; as many as lie between two rows of metrics.jsonl


class Measured(loop._Run):
    """The loop, with a clock that stands still while the bare step runs."""

    def __init__(self, *args):
        super().__init__(*args)
        self.bare_step = jax.jit(make_train_step(self.config, self.tx), donate_argnums=0)
        self.of_loop: list[float] = []
        self.of_bare: list[float] = []
        self.mark = 0.0

    def _add(self, report, batch, state):
        super()._add(report, batch, state)
        self.of_loop.append(time.perf_counter() - self.mark)
        if len(self.of_loop) % BLOCK == 0:
            with self.clock.paused():
                self._run_bare(jax.block_until_ready(jax.tree.map(jnp.copy, state)), batch)
        self.mark = time.perf_counter()

    def _run_bare(self, state, batch):
        for _ in range(BLOCK):
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(self.bare_step(state, batch))
            self.of_bare.append(time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent.parent / "configs" / "quickstart.py"))
    parser.add_argument("--blocks", type=int, default=12)
    args = parser.parse_args()
    steps = (args.blocks + 1) * BLOCK
    never = str(10 * steps)
    overrides = {
        "train.steps": str(steps),
        "train.log_every": str(BLOCK),
        "eval.every": never,
        "eval.batches": "1",
        "checkpoint.every": never,
    }
    loaded = load(ExperimentConfig, args.config, list(overrides.items()))
    prepare_devices(1)
    runs: list[Measured] = []
    loop._Run = lambda *given: runs.append(Measured(*given)) or runs[-1]
    with tempfile.TemporaryDirectory() as folder:
        loop.train(loaded, Path(folder) / "run")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    report(np.array(runs[0].of_loop)[BLOCK:], np.array(runs[0].of_bare)[BLOCK:], rows)  # the first block compiles


def report(of_loop: np.ndarray, of_bare: np.ndarray, rows: list[dict]) -> None:
    """Prints the figures of `of_loop` and `of_bare`, seconds per step."""
    blocks = of_loop.reshape(-1, BLOCK).sum(1) / of_bare.reshape(-1, BLOCK).sum(1)
    waits = [row["data_wait_fraction"] for row in rows if row["split"] == "train" and row["step"] > BLOCK]
    print(f"loop: {quartiles(1e3 * of_loop)} ms per step, mean {1e3 * of_loop.mean():.3f}")
    print(f"bare: {quartiles(1e3 * of_bare)} ms per step, mean {1e3 * of_bare.mean():.3f}")
    print(f"loop / bare, by block of {BLOCK} steps and the row written in it: {quartiles(blocks)}")
    print(f"waiting for data: {quartiles(100 * np.array(waits))} % of the loop's time")


if __name__ == "__main__":
    main()
