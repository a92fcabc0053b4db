"""Verdicts: which arms differ from the base by more than seeds and evaluation text explain.

Arms are paired with the base seed by seed and evaluation batch by evaluation batch. The variance between seeds is that
of a few runs an arm, too few to trust: arms lend each other theirs (moderated t, Smyth 2004, 10.2202/1544-6115.1027).
Many arms are many chances to be wrong: p-values are Holm's."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests

BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"
POWER = 0.8
MOST_SEEDS = 1000
MOST_PRIOR = 4
"""Degrees of freedom that other arms may lend."""
SIMULATED = 400_000
"""Runs, for the power of a study: the fewer seeds it has, the more studies have to be simulated."""
QUANTILES = 200
"""Of the estimated deviation, over which power is integrated."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one arm against the base."""

    difference: float  # of the means, arm − base, in the metric's unit
    low: Optional[float]  # its interval, at the level divided by the number of arms: all intervals hold together
    high: Optional[float]  # None with one seed, as the next three
    p: Optional[float]  # of no difference
    adjusted_p: Optional[float]  # Holm's, over the study's arms
    effect_size: Optional[float]  # the difference in deviations of a paired difference between seeds
    verdict: str
    seeds_needed: Optional[int]  # for a verdict with a power of 0.8, were the difference the true one; None: over 1000
    with_more_text: Optional[int]  # the same if the evaluation had no end of text
    of_text: float  # variance of the difference, had other text been drawn for the evaluation
    exploratory: bool  # open: neither shown nor known to be smaller than what would matter


def verdicts(
    losses: Mapping[str, np.ndarray],
    weights: np.ndarray,
    base: str,
    *,
    level: float = 0.05,
    higher_is_better: bool = False,
    effect: Optional[float] = None,
) -> dict[str, Verdict]:
    """The verdict of every arm but the base.

    Args:
      losses: arm → [seeds, batches], the metric of each evaluation batch; seeds and batches in one order for all.
      weights: [batches], how much a batch counts in the metric: its number of targets.
      level: how often, at most, a study without any difference may give a wrong verdict.
      effect: the smallest difference that would matter. An arm that is not shown to differ, and whose interval reaches
        beyond it, is exploratory: these runs do not decide it. None: all that are not shown to differ are.

    With one seed there is nothing to judge by: no arm gets a verdict.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    arms = [arm for arm in losses if arm != base]
    apart = {arm: np.asarray(losses[arm], np.float64) - losses[base] for arm in arms}
    seeds = losses[base].shape[0]
    means = {arm: each @ share for arm, each in apart.items()}
    if seeds < 2:
        return {arm: _unknown(float(each.mean())) for arm, each in means.items()}
    between, df = moderated(np.array([means[arm].var(ddof=1) for arm in arms]), seeds - 1)
    of_text = np.array([_text_variance(apart[arm], share) for arm in arms])
    errors = np.sqrt(between / seeds + of_text)
    differences = np.array([means[arm].mean() for arm in arms])
    p = 2 * stats.t.sf(np.abs(differences) / np.maximum(errors, 1e-300), df)
    adjusted = np.asarray(multipletests(p, method="holm")[1])
    critical = stats.t.isf(level / len(arms) / 2, df)
    found = {}
    columns = (arms, differences, errors, between, of_text, p, adjusted)
    for arm, d, error, v, text, each, both in zip(*columns, strict=True):
        shown, needed = both < level, functools.partial(seeds_needed, float(d), float(v), len(arms), level)
        found[arm] = Verdict(
            difference=float(d),
            low=float(d - critical * error),
            high=float(d + critical * error),
            p=float(each),
            adjusted_p=float(both),
            effect_size=float(d / max(np.sqrt(v), 1e-300)),
            verdict=(BETTER if (d > 0) == higher_is_better else WORSE) if shown else UNDECIDED,
            seeds_needed=seeds if shown else _more(seeds, needed(float(text))),
            with_more_text=seeds if shown else _more(seeds, needed()),
            of_text=float(text),
            exploratory=bool(not shown and (effect is None or abs(d) + critical * error >= effect)),
        )
    return found


def _more(seeds: int, needed: Optional[int]) -> Optional[int]:
    """Than the seeds that gave no verdict, though with as many four studies in five may have one."""
    return None if needed is None else max(needed, seeds + 1)


def _unknown(difference: float) -> Verdict:
    """Of one seed."""
    return Verdict(
        difference=difference,
        low=None,
        high=None,
        p=None,
        adjusted_p=None,
        effect_size=None,
        verdict=UNDECIDED,
        seeds_needed=None,
        with_more_text=None,
        of_text=0.0,
        exploratory=True,
    )


def _text_variance(apart: np.ndarray, share: np.ndarray) -> float:
    """Of a weighted mean over evaluation batches, had others been drawn; 0 for one batch, of which nothing is known.

    What seeds make of single batches is in the variance between seeds already, and taken out here."""
    seeds, count = apart.shape
    if count < 2:
        return 0.0
    of_batch = apart.mean(axis=0) - (apart @ share).mean()
    rest = apart - (apart @ share)[:, None] - of_batch
    squares = of_batch**2 - (rest**2).sum(axis=0) / (seeds * (seeds - 1))
    return max(0.0, float(count / (count - 1) * np.sum(share**2 * squares)))


def moderated(variances: np.ndarray, df: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances `[..., arms]` of `df` degrees of freedom each, drawn towards the common prior of the arms, and the
    degrees of freedom `[...]` then.

    The prior's scale and degrees of freedom are estimated from all (Smyth 2004, §6.2), with precautions that keep wrong
    verdicts rare in studies of a few arms, and of arms that do not vary alike: the prior counts for no more than
    `MOST_PRIOR` degrees of freedom, no variance is put below its scale, and all together count for fewer degrees of
    freedom than independent ones would. Arms share the runs of the base, so that the mean of A variances has
    4 A / (A + 3) times the degrees of freedom of one, by its second moment; that of two has a heavier tail than this
    says, and counts for 1.5 times. What is left: at two seeds and two arms 5.6 % of studies without a difference have a
    wrong verdict, and with three seeds and six arms, one of which deviates four (eight) times as much as the others and
    the base, 5.7 % (8.4 %). A single variance stays as it is."""
    variances = np.maximum(variances, 1e-300)
    arms = variances.shape[-1]
    if arms < 2:
        return variances, np.full(variances.shape[:-1], float(df))
    logs = np.log(variances) - special.digamma(df / 2) + np.log(df / 2)
    excess = logs.var(axis=-1, ddof=1) - special.polygamma(1, df / 2)
    least = special.polygamma(1, MOST_PRIOR / 2)
    half = _trigamma_inverse(np.maximum(excess, least))
    # Less excess: they are hardly more different than draws of one variance, whose estimate is their mean.
    few = np.exp(logs.mean(axis=-1) + special.digamma(half) - np.log(half))
    scale = np.where(excess > least, few, variances.mean(axis=-1))[..., None]
    drawn = (2 * half[..., None] * scale + df * variances) / (2 * half[..., None] + df)
    together = min(4 * arms / (arms + 3), (arms + 1) / 2) * df
    return np.maximum(drawn, scale), np.minimum(2 * half + df, together)


def _trigamma_inverse(values: np.ndarray) -> np.ndarray:
    """By Newton's steps on 1 / trigamma, which is convex: they come from one side (Smyth 2004, appendix)."""
    at = 0.5 + 1 / values
    for _ in range(8):
        trigamma = special.polygamma(1, at)
        at = at + trigamma * (1 - trigamma / values) / special.polygamma(2, at)
    return at


def power(difference: float, variance: float, seeds: int, arms: int, level: float = 0.05, text: float = 0.0) -> float:
    """How often a difference is shown. `variance`: of a paired difference between seeds; `text`: what evaluation text
    adds to that of the mean. By the strictest of Holm's levels, and as if arms varied alike."""
    shift = abs(difference) / np.sqrt(variance / seeds + text)
    # A noncentral t of moderated variances has no closed form: integrated over what a difference must reach.
    least = _least_shown(seeds - 1, arms, level)
    shown = special.ndtr(shift - least) + special.ndtr(-least - shift)
    return float(shown.mean())


@functools.cache
def _least_shown(df: int, arms: int, level: float) -> np.ndarray:
    """Quantiles, over simulated studies whose arms vary alike, of the least difference that is shown, in its true
    deviations."""
    # The arms' variances have the base's runs in common, which are half of each.
    studies = max(100, SIMULATED // ((arms + 1) * (df + 1)))
    runs = np.random.default_rng(0).normal(size=(studies, arms + 1, df + 1))
    variances, moderated_df = moderated((runs[:, 1:] - runs[:, :1]).var(axis=2, ddof=1) / 2, df)
    # SciPy's special functions, as its distributions take a hundred times as long to call.
    critical = special.stdtrit(moderated_df, 1 - level / arms / 2)
    return np.quantile(critical[:, None] * np.sqrt(variances), (np.arange(QUANTILES) + 0.5) / QUANTILES)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(function, low, high))  # pyright: ignore[reportArgumentType]


def detectable(variance: float, seeds: int, arms: int, level: float = 0.05, text: float = 0.0) -> float:
    """The smallest difference that is shown with a power of 0.8; arguments as of `power`."""
    most = 100 * np.sqrt(variance + text)
    return _root(lambda d: power(d, variance, seeds, arms, level, text) - POWER, 1e-9 * most, most)


def seeds_needed(
    difference: float, variance: float, arms: int, level: float = 0.05, text: float = 0.0
) -> Optional[int]:
    """Seeds that would show this difference with a power of 0.8; None if 1000 would not."""
    enough = lambda seeds: power(difference, variance, seeds, arms, level, text) >= POWER  # noqa: E731
    if difference == 0 or not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
