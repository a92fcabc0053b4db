"""Small studies for tests, each in a project of its own."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = {"train.steps": 4, "train.log_every": 2, "checkpoint.every": 2, "eval.batches": 2}
TINY = [f"--config.{key}={value}" for key, value in SETTINGS.items()] + ["--config.optimizer.schedule.warmup_steps=1"]
STUDY = """
from pathlib import Path

from sparsejax.ablate import Arm, Study


def joint(runs):
    with open(Path(__file__).with_suffix(".calls"), "a") as calls:
        print(*runs, file=calls)
    return {{name: {{"arms_of_seed": len(runs)}} for name in runs}} | {{"cut": {{"arms_of_seed": 0.5}}}}


STUDY = Study(
    question="Which learning rate?",
    config="configs/tiny.py",
    arms={{{arms}}},
    base="a",
    varies=("optimizer.learning_rate", "train.max_nonfinite"),
    seeds={seeds},
    together=joint,
    timed={timed},
    scales={{"wide": {{"train.log_every": 1}}}},
)
"""
ARMS = '"a": Arm(), "b": Arm(edits={"optimizer.learning_rate": 1e-4})'


def write_study(folder: Path, arms: str = ARMS, seeds: str = "(0, 1)", timed: bool = False) -> list[str]:
    """The words of its command."""
    path = folder / "experiments" / "rates.py"
    path.write_text(STUDY.format(arms=arms, seeds=seeds, timed=timed))
    return ["ablate", str(path), f"--workdir={folder / 'runs'}", *TINY]


def results(folder: Path) -> dict:
    return json.loads((folder / "runs" / "rates.json").read_text())
