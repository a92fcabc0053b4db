"""The exit table: what every exit of a model would say of every example, from one evaluation pass.

Whatever is asked of early exits offline is a function of it: a rule at any threshold, a guarantee, a curve. An example
is what decides to leave: a sequence of a classifier, a token of a language model. All of NumPy."""

import dataclasses
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from jaxtyping import Bool, Float, Int

from sparsejax.base.errors import RequestError
from sparsejax.base.writers import write_atomically


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitTable:
    """N examples at E exits, the cheapest first; the last is the full model. Measures are float32, in nats where they
    are of information."""

    cost: Float[np.ndarray, " E"]  # FLOPs of an example that leaves there, all heads on its way included
    depth: Int[np.ndarray, " E"]  # layers run
    classes: Int[np.ndarray, ""]
    target: Int[np.ndarray, " N"]
    prediction: Int[np.ndarray, "N E"]
    loss: Float[np.ndarray, "N E"]  # −log of the target's probability
    correct: Bool[np.ndarray, "N E"]
    max_prob: Float[np.ndarray, "N E"]
    margin: Float[np.ndarray, "N E"]  # the largest probability less the second
    entropy: Float[np.ndarray, "N E"]
    divergence: Float[np.ndarray, "N E"]  # Jensen–Shannon, of this and the previous exit's; ∞ at the first
    similarity: Optional[Float[np.ndarray, "N E"]] = None  # cosine of this and the previous state; −1 at the first
    score: Optional[Float[np.ndarray, "N E"]] = None  # of a learned exit head, in [0, 1]
    logits: Optional[Float[np.ndarray, "N E C"]] = None  # for what needs whole distributions
    group: Optional[Int[np.ndarray, " N"]] = None  # the sequence that a token belongs to

    def __post_init__(self):
        shapes = {name: np.shape(getattr(self, name)) for name in _BY_EXIT if getattr(self, name) is not None}
        expected = (len(self.target), len(self.cost))
        for name, shape in shapes.items():
            if shape[:2] != expected:
                raise ValueError(f"{name} has shape {shape}; {expected[0]} examples at {expected[1]} exits are known")
        if len(self.depth) != len(self.cost) or (np.diff(self.depth) <= 0).any() or (np.diff(self.cost) <= 0).any():
            raise ValueError("cost and depth have to rise from exit to exit")

    def __len__(self) -> int:
        return len(self.target)

    @property
    def exits(self) -> int:
        return len(self.cost)

    def take(self, index: np.ndarray) -> "ExitTable":
        """Some of the examples, by index or mask."""
        given = {name: getattr(self, name) for name in _BY_EXAMPLE}
        taken = {name: value[index] for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **taken)

    def save(self, path: Path) -> None:
        """Writes an `.npz` file with the fields by name."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: value for name, value in given.items() if value is not None})
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "ExitTable":
        """What `save` wrote. Raises `RequestError` for a file that is no exit table."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**{name: file[name] for name in file.files})
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise RequestError(f"{path} is no exit table: {error}") from error


_BY_EXIT = (
    "prediction",
    "loss",
    "correct",
    "max_prob",
    "margin",
    "entropy",
    "divergence",
    "similarity",
    "score",
    "logits",
)
_BY_EXAMPLE = ("target", "group", *_BY_EXIT)


def exit_table(
    logits_NEC: Float[np.ndarray, "N E C"],
    target_N: Int[np.ndarray, " N"],
    *,
    cost: Float[np.ndarray, " E"],
    depth: Int[np.ndarray, " E"],
    states_NED: Optional[Float[np.ndarray, "N E D"]] = None,
    score: Optional[Float[np.ndarray, "N E"]] = None,
    group: Optional[Int[np.ndarray, " N"]] = None,
    keep_logits: bool = False,
) -> ExitTable:
    """The table of what the heads said; `states_NED` are what they read. Of equal logits the first is predicted."""
    log_p = log_softmax(logits_NEC)
    p = np.exp(log_p)
    best_two = np.partition(p, -2, axis=-1)[..., -2:] if p.shape[-1] > 1 else np.stack([0 * p[..., 0], p[..., 0]], -1)
    prediction = np.argmax(log_p, axis=-1).astype(np.int32)
    loss = -np.take_along_axis(log_p, target_N[:, None, None], axis=-1)[..., 0]
    similarity = None if states_NED is None else _with_first(_cosines(states_NED), -1.0)
    return ExitTable(
        cost=np.asarray(cost, np.float64),
        depth=np.asarray(depth, np.int32),
        classes=np.asarray(p.shape[-1], np.int32),
        target=np.asarray(target_N, np.int32),
        prediction=prediction,
        loss=_narrow(loss),
        correct=prediction == target_N[:, None],
        max_prob=_narrow(best_two[..., 1]),
        margin=_narrow(best_two[..., 1] - best_two[..., 0]),
        entropy=_narrow(-_times_log(p, log_p).sum(-1)),
        divergence=_with_first(jensen_shannon(p[:, 1:], p[:, :-1]), np.inf),
        similarity=similarity,
        score=None if score is None else _narrow(score),
        logits=_narrow(logits_NEC) if keep_logits else None,
        group=group,
    )


def concatenate(tables: list[ExitTable]) -> ExitTable:
    """One table of the examples of several, batch after batch."""
    joined = {}
    for name in _BY_EXAMPLE:
        given = [getattr(table, name) for table in tables]
        joined[name] = None if given[0] is None else np.concatenate(given)
    return dataclasses.replace(tables[0], **joined)


def log_softmax(logits: Float[np.ndarray, "*N C"]) -> Float[np.ndarray, "*N C"]:
    """In float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def jensen_shannon(p: Float[np.ndarray, "*N C"], q: Float[np.ndarray, "*N C"]) -> Float[np.ndarray, "*N"]:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q): between 0 and log 2 nats, and symmetric."""
    middle = np.log(np.maximum(0.5 * (p + q), 1e-300))
    each = [_times_log(side, np.log(np.maximum(side, 1e-300)) - middle) for side in (p, q)]
    return np.maximum(0.5 * (each[0] + each[1]).sum(-1), 0)


def _times_log(p: np.ndarray, log: np.ndarray) -> np.ndarray:
    """p · log, 0 where p is 0."""
    return np.where(p > 0, p * np.where(p > 0, log, 0), 0)


def _cosines(states_NED: np.ndarray) -> np.ndarray:
    wide = np.asarray(states_NED, np.float64)
    wide = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-30)
    return (wide[:, 1:] * wide[:, :-1]).sum(-1)


def _with_first(later: np.ndarray, first: float) -> np.ndarray:
    return _narrow(np.concatenate([np.full((len(later), 1), first), later], axis=1))


def _narrow(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)
