"""The law of Clark et al. 2022 (arXiv:2202.01169) for routed models, fitted to a study's runs.

    log L(N, E) = a log N + b log Ê + c log N · log Ê + d,    1/Ê = 1/(E − 1 + 1/(1/E_start − 1/E_max)) + 1/E_max

N: parameters of the dense model of the same compute; E: experts. Without saturation (`limits` None) Ê = E.

    python -m sparsejax.ablate.scaling RESULTS.json [RESULTS.json …] [--saturation | --limits=E_START,E_MAX] [--out=DIR]

fits it for each router of studies whose arms are named ROUTER-eE beside a dense base; each file is one size N. `--out`
keeps the table and a figure as NAME_law.md and NAME_law.svg."""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from scipy import stats

from sparsejax.ablate.figures import drawing
from sparsejax.ablate.page import table
from sparsejax.base.errors import RequestError, tell
from sparsejax.base.flags import Parser
from sparsejax.base.writers import write_atomically

Limits = tuple[float, float]
"""(E_start, E_max)."""
NAMES = ("a", "b", "c", "d")
TRIED = 48
"""Values of E_start and of E_max among which the best are sought."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Means of the log losses of the runs of one size and number of experts. Arrays `[cells]`."""

    parameters: np.ndarray
    experts: np.ndarray
    losses: np.ndarray
    of_seeds: float  # variance of such a mean, by how runs of a cell differ; 0 where each has one
    left: int  # degrees of freedom of that

    @staticmethod
    def of(parameters: np.ndarray, experts: np.ndarray, losses: np.ndarray) -> "Cells":
        """Arguments `[runs]`."""
        places, inverse = np.unique(np.stack([parameters, experts], 1).astype(float), axis=0, return_inverse=True)
        logs, runs = np.log(losses), np.bincount(inverse)
        means = np.bincount(inverse, logs) / runs
        left = len(logs) - len(means)
        within = np.sum((logs - means[inverse]) ** 2) / left if left else 0.0
        of_seeds = float(within * np.mean(1 / runs))
        return Cells(parameters=places[:, 0], experts=places[:, 1], losses=means, of_seeds=of_seeds, left=left)

    def reach(self, variance: float, left: int, level: float) -> float:
        """Deviations of a mean within which a coefficient is told, times their size: by `variance`, with which the law
        was missed at so many degrees of freedom, or by the seeds', whichever is wider."""
        by_law = stats.t.isf(level / 2, left) * np.sqrt(variance)
        by_seeds = stats.t.isf(level / 2, self.left) * np.sqrt(self.of_seeds) if self.left else 0.0
        return float(max(by_law, by_seeds))


@dataclass(frozen=True, kw_only=True)
class Law:
    """Coefficients by name, each (estimate, low, high)."""

    coefficients: Mapping[str, tuple[float, float, float]]
    deviation: float  # of a cell's mean log loss from the law
    of_seeds: float  # of such a mean, by seeds alone
    cells: int
    limits: Optional[Limits] = None
    reaches: Optional[tuple[Limits, Limits]] = None  # intervals of limits that were fitted; infinite where not told

    def loss(self, parameters: float | np.ndarray, experts: float | np.ndarray) -> np.ndarray:
        """What the law predicts, in the unit of the losses it was fitted to."""
        known = {name: self.coefficients.get(name, (0.0,))[0] for name in NAMES}
        n, e = np.log(parameters), np.log(saturated(experts, self.limits))
        return np.exp(known["a"] * n + known["b"] * e + known["c"] * n * e + known["d"])


def saturated(experts: float | np.ndarray, limits: Optional[Limits]) -> np.ndarray:
    """Ê. One expert counts as E_start, any number as less than E_max."""
    experts = np.asarray(experts, float)
    if limits is None:
        return experts
    start, most = limits
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def fit(cells: Cells, limits: Optional[Limits] = None, *, fitted: int = 0, level: float = 0.05) -> Law:
    """Least squares in log space; intervals are those of Student's t.

    A cell is one observation, however many seeds it has: what a number of experts does beside the law, all seeds of the
    cell share, and intervals that took them as independent would be too narrow. Where a few cells happen to lie nearer
    to the law than seeds lie to each other, the intervals are those of the seeds. `fitted`: how many of the limits
    were fitted to the same cells. With one value of N only `b` and `d` can be told, with several all four.

    Raises `ValueError` when there are no more cells than what is fitted."""
    design = _design(cells, limits)
    matrix, free = np.stack(list(design.values()), 1), len(design) + fitted
    count = len(cells.losses)
    if count <= free or np.linalg.matrix_rank(matrix) < len(design):
        raise ValueError(f"{count} cells (a size, a number of experts) do not tell {free} coefficients")
    solution = np.linalg.lstsq(matrix, cells.losses, rcond=None)[0]
    variance = np.sum((cells.losses - matrix @ solution) ** 2) / (count - free)
    reach = cells.reach(variance, count - free, level) * np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)))
    each = zip(design, solution, reach, strict=True)
    coefficients = {name: (float(v), float(v - r), float(v + r)) for name, v, r in each}
    apart, of_seeds = np.sqrt([variance, cells.of_seeds]).tolist()
    return Law(coefficients=coefficients, deviation=apart, of_seeds=of_seeds, cells=count, limits=limits)


def fit_saturation(cells: Cells, *, level: float = 0.05) -> Law:
    """The law with the E_start and E_max that fit best among those tried. All intervals are those of profiles (an F
    test): what some limits and coefficients that fit nearly as well have. An end of limits that the cells do not tell
    is infinite, or 1 for E_start. Were the limits taken as known, the coefficients' intervals would be far too narrow.

    Raises `ValueError` as `fit` does."""
    most_seen = cells.experts.max()
    starts = np.geomspace(1.0, most_seen, TRIED)
    mosts = np.geomspace(1.01 * most_seen, 1000 * most_seen, TRIED)
    every = [(float(start), float(most)) for start in starts for most in mosts]
    matrices = np.stack([np.stack(list(_design(cells, limits).values()), 1) for limits in every])
    q, r = np.linalg.qr(matrices)  # [tried, cells, coefficients], [tried, coefficients, coefficients]
    along, inverse = np.einsum("tnc,n->tc", q, cells.losses), np.linalg.pinv(r)
    rest = np.sum((cells.losses - np.einsum("tnc,tc->tn", q, along)) ** 2, 1)
    law = fit(cells, every[np.argmin(rest)], fitted=2, level=level)
    left = law.cells - len(law.coefficients) - 2
    allowed = rest.min() + cells.reach(rest.min() / left, left, level) ** 2
    inside = rest <= allowed
    # With limits given, the sum of squares rises from its least with the square of a coefficient's distance.
    values = np.einsum("tij,tj->ti", inverse, along)[inside]
    reach = np.sqrt((allowed - rest[inside])[:, None] * np.sum(inverse[inside] ** 2, 2))
    lows, highs = (values - reach).min(0), (values + reach).max(0)
    told = zip(law.coefficients.items(), lows, highs, strict=True)
    reaches = []
    square = inside.reshape(TRIED, TRIED)
    for tried, found, least in ((starts, square.any(1), 1.0), (mosts, square.any(0), most_seen)):
        at = np.flatnonzero(found)
        low = least if at[0] == 0 else tried[at[0] - 1]
        reaches.append((float(low), np.inf if at[-1] == TRIED - 1 else float(tried[at[-1] + 1])))
    coefficients = {name: (value, float(low), float(high)) for (name, (value, _, _)), low, high in told}
    return dataclasses.replace(law, coefficients=coefficients, reaches=(reaches[0], reaches[1]))


def _design(cells: Cells, limits: Optional[Limits]) -> dict[str, np.ndarray]:
    n, e = np.log(cells.parameters), np.log(saturated(cells.experts, limits))
    if np.ptp(n) == 0:
        return {"b": e, "d": np.ones_like(n)}
    return {"a": n, "b": e, "c": n * e, "d": np.ones_like(n)}


def cells_of(studies: Sequence[Mapping[str, Any]]) -> dict[str, Cells]:
    """Router → its cells and those of the dense models, from what `ablate` wrote of studies at several sizes.

    Raises `ValueError` for a router without a finished run."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    shared = []
    for study in studies:
        dense = study["arms"][study["base"]]["parameters"]
        for name, arm in study["arms"].items():
            found = re.fullmatch(r"(.+)-e([1-9]\d*)", name)
            runs = _losses(study, arm)
            if found:
                points.setdefault(found[1], []).extend((dense, float(found[2]), loss) for loss in runs)
            elif name == study["base"]:
                shared += [(dense, 1.0, loss) for loss in runs]
    empty = [name for name, each in points.items() if not each]
    if empty:
        raise ValueError(f"{empty[0]}: none of its runs is done")
    return {name: Cells.of(*np.array([*shared, *each]).T) for name, each in points.items()}


def _losses(study: Mapping[str, Any], arm: Mapping[str, Any]) -> list[float]:
    return [run["figures"][study["metric"]] for run in arm["runs"].values() if run["status"] == "done"]


def lines(found: Mapping[str, Law]) -> list[str]:
    """The laws as Markdown. Deviations are of a cell's mean log loss."""
    limited = limited_by(found)
    rows = []
    for name, law in found.items():
        told = {key: f"{v:+.4f} [{low:+.4f}, {high:+.4f}]" for key, (v, low, high) in law.coefficients.items()}
        limits = [f"{value:.3g}" for value in law.limits or ()]
        if law.reaches is not None:
            ends = [f"[{low:.3g}, {'∞' if np.isinf(high) else format(high, '.3g')}]" for low, high in law.reaches]
            limits = [f"{value} {each}" for value, each in zip(limits, ends, strict=True)]
        rows.append([f"`{name}`", *(told.get(key, "") for key in NAMES), *limits, f"{law.deviation:.4f}"])
        rows[-1] += [f"{law.of_seeds:.4f}", str(law.cells)]
    ends = ("E_start", "E_max") if limited else ()
    head = ["router", *NAMES, *ends, "deviation from the law", "of seeds", "cells"]
    return table(head, rows)


def limited_by(found: Mapping[str, Law]) -> bool:
    """Whether the laws saturate."""
    return any(law.limits for law in found.values())


def _draw(path: Path, cells: Mapping[str, Cells], found: Mapping[str, Law], metric: str) -> None:
    """Losses against experts, a colour a router, a line a size."""
    with drawing(path, figsize=(7, 4)) as panel:
        for number, (name, law) in enumerate(found.items()):
            each = cells[name]
            for size in np.unique(each.parameters):
                here, label = each.parameters == size, f"{name}, {size / 1e6:.3g} M parameters dense"
                style = {"color": f"C{number}", "alpha": 0.4 + 0.6 * size / each.parameters.max()}
                panel.plot(each.experts[here], np.exp(each.losses[here]), "o", label=label, markersize=4, **style)
                across = np.geomspace(1, each.experts.max(), 50)
                panel.plot(across, law.loss(size, across), linewidth=1, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("experts")
        panel.set_ylabel(metric.replace("_", " "))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)


def _read(file: Path) -> dict[str, Any]:
    """Results whose every finished run has a loss that the law can be fitted to."""
    try:
        study = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: not the results of a study: {error}") from None
    if not isinstance(study, dict) or not {"arms", "base", "metric"} <= study.keys():
        raise RequestError(f"{file}: not the results of a study: it has no arms")
    try:
        sizes = [study["arms"][study["base"]]["parameters"]]
        losses = {name: _losses(study, arm) for name, arm in study["arms"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise RequestError(f"{file}: not the results of a study: {type(error).__name__} {error}") from None
    for name, values in {f"parameters of {study['base']}": sizes, **losses}.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
                raise RequestError(f"{file}: {name}: {value} has no logarithm, which the law is of")
    if not losses[study["base"]]:
        raise RequestError(f"{file}: no run of {study['base']}, the base, is done")
    if study.get("higher_is_better"):
        raise RequestError(f"{file}: {study['metric']} is no loss: higher is better")
    return study


def _limits(text: str) -> Limits:
    try:
        start, most = map(float, text.split(","))
    except ValueError:
        raise RequestError(f"--limits={text}; allowed: E_START,E_MAX, two numbers") from None
    if not 1 <= start < most:
        raise RequestError(f"--limits={text}; allowed: 1 <= E_START < E_MAX")
    return start, most


def main(words: Sequence[str]) -> int:
    """Prints the laws of these results. Returns the exit status."""
    parser = Parser(prog="python -m sparsejax.ablate.scaling")
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--saturation", action="store_true", help="fit E_start and E_max, too")
    parser.add_argument("--limits", metavar="E_START,E_MAX", help="that are known")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the table and a figure there")
    args = parser.parse_args(words)
    if not args.results:
        raise RequestError("which results? python -m sparsejax.ablate.scaling RESULTS.json [RESULTS.json …]")
    if args.saturation and args.limits is not None:
        raise RequestError("--limits: known limits are not fitted; leave out --saturation")
    limits = None if args.limits is None else _limits(args.limits)
    studies = [_read(file) for file in args.results]
    for place, (file, study) in enumerate(zip(args.results, studies, strict=True)):
        if any(file.samefile(other) for other in args.results[:place]):
            raise RequestError(f"{file} is given twice; allowed: each size once")
        if study["metric"] != studies[0]["metric"]:
            raise RequestError(f"{file}: its metric is {study['metric']}, that of {args.results[0]} is another")
    try:
        cells = cells_of(studies)
        if not cells:
            raise RequestError(f"{args.results[0]}: no arm is named ROUTER-eE, which says how many experts it has")
        found = {name: fit_saturation(each) if args.saturation else fit(each, limits) for name, each in cells.items()}
    except ValueError as error:
        raise RequestError(str(error)) from None
    print("\n".join(lines(found)))
    if args.out is not None:
        _keep(args.out, [file.stem for file in args.results], cells, found, studies[0]["metric"])
    return 0


def _keep(
    folder: Path, names: Sequence[str], cells: Mapping[str, Cells], found: Mapping[str, Law], metric: str
) -> None:
    name = f"{names[0]}_law"
    e = "Ê" if limited_by(found) else "E"
    pages = " and ".join(f"[{each}]({each}.md)" for each in dict.fromkeys(names))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out={folder}: {error.strerror}") from None
    _draw(folder / f"{name}.svg", cells, found, metric)
    text = [
        f"# The law of Clark et al. (arXiv:2202.01169), fitted to {names[0]}",
        "",
        f"log L = a log N + b log {e} + c log N · log {e} + d; N: parameters of the dense model that computes as much,",
        f"{'Ê: experts, with E_start and E_max' if limited_by(found) else 'E: experts, without saturation'}.",
        f"`python -m sparsejax.ablate.scaling` made it of the means over seeds of {pages}; 95 % intervals.",
        "",
        *lines(found),
        "",
        f"![losses against experts, and the law]({name}.svg)",
    ]
    write_atomically(folder / f"{name}.md", ("\n".join(text) + "\n").encode())


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RequestError as error:
        sys.exit(tell(error))
