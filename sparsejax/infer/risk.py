"""From a tolerated risk to a rule for early exits, with a guarantee for examples drawn as those that calibrate.

A risk is the mean of a loss in [0, `bound`]; `losses_KN` has a row for every candidate rule, from the safest to the
fastest. Each method answers with the index of the fastest row that it vouches for, None for none: use the full model.

* `conformal_risk`: E risk ≤ tolerance, over draws of the calibration examples, too;
* `learn_then_test`, `upper_bound`: P(risk ≤ tolerance) ≥ 1 − failure over those draws."""

from typing import Optional

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from scipy.special import rel_entr
from scipy.stats import binom

Losses = Float[np.ndarray, "K N"]


def conformal_risk(losses_KN: Losses, tolerance: float, *, bound: float = 1.0) -> Optional[int]:
    """Conformal risk control (arXiv:2208.02814): the last row before R̂ exceeds ((n + 1) tolerance − bound) / n.

    Its proof needs each example's loss to rise along the rows. It is made to: the largest loss of a row and all safer
    ones counts, so the guarantee holds whatever the losses, if cautiously."""
    losses_KN = _checked(losses_KN, tolerance, bound)
    n = losses_KN.shape[1]
    risk_K = np.maximum.accumulate(losses_KN, axis=0).mean(1)
    return _last_of_first(risk_K <= ((n + 1) * tolerance - bound) / n)


def learn_then_test(losses_KN: Losses, tolerance: float, failure: float, *, bound: float = 1.0) -> Optional[int]:
    """Learn-then-Test (arXiv:2110.01052): fixed-sequence testing from the safest row on, each at level `failure`, of
    the hypothesis that its risk exceeds the tolerance. The row before the first that is not rejected; risks need not
    rise."""
    losses_KN = _checked(losses_KN, tolerance, bound, failure)
    p_K = hoeffding_bentkus(losses_KN.mean(1) / bound, losses_KN.shape[1], tolerance / bound)
    return _last_of_first(p_K <= failure)


def upper_bound(losses_KN: Losses, tolerance: float, failure: float, *, bound: float = 1.0) -> Optional[int]:
    """The last row up to which the upper confidence bound of every risk, `betting_bound`, is below the tolerance (the
    rule of arXiv:2101.02703). Each bound is a test, so this is fixed-sequence testing as well."""
    losses_KN = _checked(losses_KN, tolerance, bound, failure)
    return _last_of_first(_log_capital(losses_KN / bound, tolerance / bound, failure) > -np.log(failure))


def hoeffding_bentkus(risk_K: Float[np.ndarray, " K"], n: int, tolerance: float) -> Float[np.ndarray, " K"]:
    """p-values, valid for losses in [0, 1], of the hypothesis risk > tolerance, given means of n losses: the smaller of
    Hoeffding's exp(−n kl(min(R̂, ε) ‖ ε)) and Bentkus' e · P(Binomial(n, ε) ≤ ⌈n R̂⌉)."""
    if tolerance >= 1:
        return np.zeros(len(risk_K))
    below_K = np.minimum(risk_K, tolerance)
    divergence_K = rel_entr(below_K, tolerance) + rel_entr(1 - below_K, 1 - tolerance)
    # Losses of 0 and 1 have a whole n R̂, which a rounding must not lift to the next.
    whole_K = np.ceil(n * np.asarray(risk_K) - 1e-9)
    return np.minimum(np.exp(-n * divergence_K), np.minimum(np.e * binom.cdf(whole_K, n, tolerance), 1))


def betting_bound(losses_N: Float[np.ndarray, " N"], failure: float) -> float:
    """An upper confidence bound, at level 1 − failure, of the mean of losses in [0, 1]: the smallest mean against which
    a gambler who bets on less would have made 1 / failure of 1 (Waudby-Smith and Ramdas, arXiv:2010.09686, with the
    bets of arXiv:2101.02703). 1 where no mean is so bad."""
    gain = lambda mean: float(_log_capital(losses_N[None], mean, failure)[0]) + np.log(failure)  # noqa: E731
    if gain(1.0) <= 0:
        return 1.0
    if gain(0.0) >= 0:
        return 0.0
    root = brentq(gain, 0.0, 1.0, xtol=1e-9)
    assert isinstance(root, float)  # SciPy's stubs have it return more
    return root


def _log_capital(losses_KN: Losses, mean: float, failure: float) -> Float[np.ndarray, " K"]:
    """log max_t Π_{j ≤ t} (1 − ν_j (ℓ_j − mean)): it rises with the mean. ν_j knows losses before the j-th only."""
    n = losses_KN.shape[1]
    order = np.arange(1, n + 1)
    mean_KN = (0.5 + np.cumsum(losses_KN, axis=1)) / (order + 1)
    variance_KN = (0.25 + np.cumsum(np.square(losses_KN - mean_KN), axis=1)) / (order + 1)
    before_KN = np.concatenate([np.full((len(losses_KN), 1), 0.25), variance_KN[:, :-1]], axis=1)
    bet_KN = np.minimum(1, np.sqrt(-2 * np.log(failure) / (n * before_KN)))
    with np.errstate(divide="ignore"):
        grown_KN = np.log(np.maximum(1 - bet_KN * (losses_KN - mean), 0))
    return np.cumsum(grown_KN, axis=1).max(1)


def _last_of_first(holds_K: Bool[np.ndarray, " K"]) -> Optional[int]:
    """The index before the first False."""
    count = int(np.logical_and.accumulate(holds_K).sum())
    return count - 1 if count else None


def _checked(losses_KN: Losses, tolerance: float, bound: float, failure: float = 0.5) -> Losses:
    losses_KN = np.asarray(losses_KN, np.float64)
    if losses_KN.ndim != 2 or not losses_KN.size:
        raise ValueError(f"losses of shape {losses_KN.shape}: rules × examples are needed, one of each at least")
    if losses_KN.min() < 0 or losses_KN.max() > bound:
        raise ValueError(f"losses from {losses_KN.min():g} to {losses_KN.max():g} leave [0, {bound:g}]")
    if tolerance < 0 or not 0 < failure < 1:
        raise ValueError(f"a tolerance of {tolerance} or failure of {failure}; allowed: 0 or more, and inside (0, 1)")
    return losses_KN
