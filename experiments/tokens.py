"""What encoders lose and gain that do not compute every token: classes right against measured throughput.

Run:  python -m sparsejax ablate experiments/tokens.py --workdir=runs/tokens --out=experiments
"""

import dataclasses
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sparsejax.ablate import Arm, Study
from sparsejax.base.config import load
from sparsejax.base.sharding import make_mesh, shard_batch
from sparsejax.blocks.skim_methods import TokenMerging
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.timing import interleaved

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from encoders import Encoder, room, shortened  # noqa: E402

CONFIG = runpy.run_path(str(ROOT / "configs" / "tokens_arm.py"))
CUTS = (64, 96, 128, 160, 192, 224)
"""Lengths of rows on which `full` is evaluated, too."""
RIGHT, SPEED = "right", "speed"
SLACK = 1.1
"""Room of a compact layer over the mean share of tokens that it keeps."""


def evaluated(runs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """What every arm gets right and how long a batch takes it; `full` on rows cut short are variants."""
    found: dict[str, dict[str, float]] = {}
    timed: dict[str, Callable[[], object]] = {}
    first = load(ExperimentConfig, str(runs["full"] / "config.json")).config
    mesh = make_mesh(first.mesh)
    with jax.set_mesh(mesh):
        rows = list(eval_batches(open_corpus(first.data), first.data, first.data.batch_size))
        batches = [shard_batch(batch, mesh, 1) for batch in rows]
        for arm, path in runs.items():
            encoder, more = Encoder(load(ExperimentConfig, str(path / "config.json")).config, path, mesh), {}
            told = encoder.over(batches)
            if arm in CONFIG["SKIMMED"]:
                encoder, told, more = compacted(encoder, path, mesh, batches, told[1])
            found[arm] = {RIGHT: told[0], **more}
            timed[arm] = lambda step=encoder, batch=batches[0]: step.step(step.variables, batch)
            for length in CUTS if arm == "full" else ():
                cut = [shard_batch(shortened(batch, length), mesh, 1) for batch in rows]
                found[f"full {length}"] = {RIGHT: encoder.over(cut)[0]}
                timed[f"full {length}"] = lambda step=encoder, batch=cut[0]: step.step(step.variables, batch)
        seconds = interleaved(timed, 20)
    for arm, figures in found.items():
        figures[SPEED] = float(np.median(seconds["full"] / seconds[arm]))
        figures["ms_per_batch"] = 1e3 * float(np.median(seconds[arm]))
    return found


def compacted(
    encoder: Encoder, path: Path, mesh: jax.sharding.Mesh, batches: Sequence, reports: Sequence
) -> tuple[Encoder, tuple, dict[str, float]]:
    """(the encoder that really drops tokens, what it gets right, its figures): room for what the masked one keeps."""
    config = encoder.config
    kept = [[float(r.skim.kept / r.skim.tokens) for r in each.values()] for each in reports]
    skim = dataclasses.replace(config.model.skim, execution="compact", ladder=room(kept, SLACK))
    if not isinstance(skim, TokenMerging):  # which is alike in all stages
        skim = dataclasses.replace(skim, stage="hard")
    model = dataclasses.replace(config.model, skim=skim, scan=False)
    compact = Encoder(dataclasses.replace(config, model=model), path, mesh)
    told = compact.over(batches)
    tokens = sum(int(r.skim.tokens) for each in told[1] for r in each.values())
    lost = sum(int(r.skim.unplaced) for each in told[1] for r in each.values())
    return compact, told, {"tokens_left": float(np.mean(kept)), "without_room": lost / tokens}


def arm(name: str) -> Arm:
    """Of the config file, beginning with what its method begins with, and in as many steps with that as the others."""
    begin = CONFIG["BEGIN"] if name in CONFIG["CONTINUED"] else None
    return Arm(argument=name, begin=begin, exploratory=name == CONFIG["BEGIN"])


STUDY = Study(
    question="What do encoders lose and gain that do not compute every token, at equal steps and data?",
    config="configs/tokens_arm.py",
    arms={name: arm(name) for name in CONFIG["ARMS"]},
    base="full",
    metric="accuracy",
    higher_is_better=True,
    equal="tokens",
    varies=("model.repeats", "model.pattern", "model.blocks", "model.skim", "model.select", "train.steps",
            "optimizer.schedule", "optimizer.learning_rate"),
    allow=("schedule",),
    deviation=0.02,
    effect=0.02,
    scales={"wide": {"model.d_model": 512, "model.num_heads": 8, "data.batch_size": 192, "mesh.data": 8}},
    together=evaluated,
    scatter=(SPEED, RIGHT),
    notes=(
        "Which of twelve packages 255 bytes of source come from; four layers of width 64. The variants are `full` on "
        "the first N tokens of each row: static truncation. Right is what the compact execution gets right, where "
        "tokens that leave are gone: every layer has room for 1.1 times the share that it keeps on average, and those "
        "without room are lost though they were to stay. Times are of the evaluation of a batch of 24 rows, all in "
        "turn; speed is over that of `full`.",
        "Arms that learn where to skip begin with `begun`, a full model after half the steps, and make the other half.",
    ),
)  # fmt: skip
