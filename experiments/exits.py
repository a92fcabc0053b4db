"""What decoders lose and gain that leave early or skip layers: bits per byte against measured time.

Run:  python -m sparsejax ablate experiments/exits.py --workdir=runs/exits --out=experiments
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import jax
import numpy as np

from sparsejax.ablate import Arm, Study, pod
from sparsejax.base.config import load
from sparsejax.base.sharding import MeshConfig, make_mesh
from sparsejax.data.corpus import open_corpus
from sparsejax.data.loader import eval_batches
from sparsejax.infer.early_exit import EarlyExit
from sparsejax.infer.generate import Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.restore import restore_variables

ARMS = ("full", *(f"depth_{layers}" for layers in (1, 2, 3, 4)), "exits", "depths", "depths_random")
BITS, SPEED = "decoded_bits", "speed"
PROMPT = 16
"""Tokens of a window that are read in one pass; those after it are scored."""
WINDOWS, ROUNDS = 8, 3
RULES = {
    "max_prob": (0.3, 0.5, 0.7, 0.9),
    "margin": (0.2, 0.4, 0.6, 0.8),
    "entropy": (0.5, 1.0, 1.5, 2.0),
    "state_similarity": (0.9, 0.95, 0.98),
    "patience": (1.0, 2.0),
}
"""Rule → thresholds."""


@dataclass
class Decoder:
    """A trained arm that scores windows."""

    generator: Generator
    variables: object
    threshold: Optional[float] = None

    def __call__(self, windows: np.ndarray) -> tuple[float, float, Optional[float]]:
        """(bits per byte, seconds per token, mean layer)."""
        found = [
            self.generator.score(self.variables, [row[:PROMPT]], [row[PROMPT:]], self.threshold) for row in windows
        ]
        nats = np.mean([each.nll[0] for each in found])
        seconds = sum(each.decode_seconds for each in found) / (windows.shape[0] * (windows.shape[1] - PROMPT))
        depths = [each.depths[0] for each in found if each.depths is not None]
        return float(nats / np.log(2)), seconds, float(np.mean(depths)) if depths else None


def decoders(arm: str, run: Path, mesh: jax.sharding.Mesh) -> dict[str, Decoder]:
    """The arm, and by every rule and threshold, if it has exits."""
    config = load(ExperimentConfig, str(run / "config.json")).config
    variables, greedy = restore_variables(config, run, mesh)[0], Sampling(temperature=0)
    found = {arm: Decoder(Generator(config.model, greedy), variables)}
    if config.model.exits.depths:
        for rule, thresholds in RULES.items():
            by_rule = Generator(config.model, greedy, decoding=EarlyExit(rule=rule, threshold=thresholds[0]))
            found |= {f"{rule} {limit:g}": Decoder(by_rule, variables, limit) for limit in thresholds}
    return found


def decoded(runs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Bits per byte and time of every arm, rule and threshold; all take turns with `full`."""
    data = load(ExperimentConfig, str(runs["full"] / "config.json")).config.data
    windows = np.concatenate(
        [np.asarray(batch["tokens"]) for batch in eval_batches(open_corpus(data), data, 1, WINDOWS)]
    )
    mesh, found, each = make_mesh(MeshConfig()), {}, {}
    with jax.set_mesh(mesh):
        for arm, run in runs.items():
            each |= decoders(arm, run, mesh)
        turns = [{name: decoder(windows) for name, decoder in each.items()} for _ in range(1 + ROUNDS)][1:]  # compiled
    for name, (bits, _, layer) in turns[0].items():
        seconds = [turn[name][1] for turn in turns]
        gains = [turn["full"][1] / turn[name][1] for turn in turns]
        found[name] = {BITS: bits, SPEED: float(np.median(gains)), "ms_per_token": 1e3 * float(np.median(seconds))}
        found[name] |= {} if layer is None else {"mean_layer": layer}
    return found


STUDY = Study(
    question="What do decoders lose and gain that leave early or skip layers, at equal steps and data?",
    config="configs/exits_arm.py",
    arms={name: Arm(argument=name) for name in ARMS},
    base="full",
    equal="tokens",
    varies=("model.repeats", "model.pattern", "model.blocks", "model.exits", "model.select"),
    deviation=0.03,
    effect=0.05,
    scales={"pod": pod(without=("model.repeats", "model.scan"))},  # layers are those of the arms
    together=decoded,
    scatter=(SPEED, BITS),
    notes=(
        "Six layers of width 96, bytes. `depth_N` has N layers, which is static truncation; the variants are rules, "
        "with their thresholds, that decide in the model `exits` where a token leaves, and what deeper layers remember "
        "of it is made from the state that it left with (`propagate`). Decoded bits and times are of eight windows of "
        "the validation split, decoded token by token at batch 1, all in turn; speed is over that of `full`.",
    ),
)
