"""The law of Clark et al. 2022 (arXiv:2202.01169) for routed models, fitted to a study's runs.

    log L(N, E) = a log N + b log Ê + c log N · log Ê + d,    1/Ê = 1/(E − 1 + 1/(1/E_start − 1/E_max)) + 1/E_max

N: parameters of the dense model of the same compute; E: experts. Without saturation (`limits` None) Ê = E.

    python -m sparsejax.ablate.scaling RESULTS.json [RESULTS.json …]

fits it for each router of studies whose arms are named ROUTER-eE beside a dense base; each file is one size N."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from scipy import stats

from sparsejax.base.errors import RequestError, tell

Limits = tuple[float, float]
"""(E_start, E_max)."""
NAMES = ("a", "b", "c", "d")


@dataclass(frozen=True, kw_only=True)
class Law:
    """Coefficients by name, each (estimate, low, high)."""

    coefficients: Mapping[str, tuple[float, float, float]]
    deviation: float  # of a run's log loss from the law
    runs: int

    def loss(self, parameters: float, experts: float, limits: Optional[Limits] = None) -> float:
        """What the law predicts, in the unit of the losses it was fitted to."""
        known = {name: self.coefficients.get(name, (0.0,))[0] for name in NAMES}
        n, e = np.log(parameters), np.log(saturated(experts, limits))
        return float(np.exp(known["a"] * n + known["b"] * e + known["c"] * n * e + known["d"]))


def saturated(experts: float | np.ndarray, limits: Optional[Limits]) -> np.ndarray:
    """Ê. One expert counts as E_start, any number as less than E_max."""
    experts = np.asarray(experts, float)
    if limits is None:
        return experts
    start, most = limits
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def fit(
    parameters: np.ndarray,
    experts: np.ndarray,
    losses: np.ndarray,
    *,
    limits: Optional[Limits] = None,
    level: float = 0.05,
) -> Law:
    """Least squares in log space; intervals are those of Student's t. Arguments `[runs]`.

    With one value of N only `b` and `d` can be told, with several all four. Raises `ValueError` when there are no more
    runs than coefficients."""
    n, e = np.log(np.asarray(parameters, float)), np.log(saturated(experts, limits))
    columns = {"a": n, "b": e, "c": n * e, "d": np.ones_like(n)}
    if np.ptp(n) == 0:
        columns = {"b": e, "d": np.ones_like(n)}
    design, target = np.stack(list(columns.values()), 1), np.log(np.asarray(losses, float))
    runs, free = design.shape
    if runs <= free or np.linalg.matrix_rank(design) < free:
        raise ValueError(f"{runs} runs do not tell {free} coefficients")
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    variance = np.sum((target - design @ solution) ** 2) / (runs - free)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    reach = stats.t.isf(level / 2, runs - free) * errors
    each = zip(columns, solution, reach, strict=True)
    return Law(
        coefficients={name: (float(v), float(v - r), float(v + r)) for name, v, r in each},
        deviation=float(np.sqrt(variance)),
        runs=runs,
    )


def laws(studies: Sequence[Mapping[str, Any]], limits: Optional[Limits] = None) -> dict[str, Law]:
    """Router → its law, from what `ablate` wrote of studies at several sizes."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    shared = []
    for study in studies:
        dense = study["arms"][study["base"]]["parameters"]
        for name, arm in study["arms"].items():
            found = re.fullmatch(r"(.+)-e(\d+)", name)
            runs = [run["figures"][study["metric"]] for run in arm["runs"].values() if run["status"] == "done"]
            if found:
                points.setdefault(found[1], []).extend((dense, float(found[2]), loss) for loss in runs)
            elif name == study["base"]:
                shared += [(dense, 1.0, loss) for loss in runs]
    return {name: fit(*np.array([*shared, *each]).T, limits=limits) for name, each in points.items()}


def lines(found: Mapping[str, Law]) -> list[str]:
    """The laws as Markdown."""
    rows = ["| router | " + " | ".join(NAMES) + " | deviation of log loss | runs |", "|---" * (len(NAMES) + 3) + "|"]
    for name, law in found.items():
        told = {key: f"{v:+.4f} [{low:+.4f}, {high:+.4f}]" for key, (v, low, high) in law.coefficients.items()}
        cells = [f"`{name}`", *(told.get(key, "") for key in NAMES), f"{law.deviation:.4f}", str(law.runs)]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main(files: Sequence[str]) -> int:
    """Prints the laws of these results. Returns the exit status."""
    if not files:
        raise RequestError("which results? python -m sparsejax.ablate.scaling RESULTS.json [RESULTS.json …]")
    studies = []
    for file in files:
        try:
            studies.append(json.loads(Path(file).read_text()))
        except (OSError, ValueError) as error:
            raise RequestError(f"{file}: not the results of a study: {error}") from None
        if not isinstance(studies[-1], dict) or not {"arms", "base", "metric"} <= studies[-1].keys():
            raise RequestError(f"{file}: not the results of a study: it has no arms")
    try:
        found = laws(studies)
    except ValueError as error:
        raise RequestError(str(error)) from None
    if not found:
        raise RequestError(f"{files[0]}: no arm is named ROUTER-eE, which says how many experts it has")
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RequestError as error:
        sys.exit(tell(error))
