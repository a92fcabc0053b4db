"""Loss terms as sums over tokens; whoever knows the totals divides."""

from typing import Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.reinforce import reinforce_terms


def cross_entropies(
    logits_BTV: Float[Array, "*B V"],
    targets_BT: Int[Array, "*B"],
    mask_BT: Bool[Array, "*B"],
    split: Optional[str] = None,
) -> Float[Array, "*B"]:
    """−log softmax(logits)[target] of every position, nats, in float32; 0 where masked.

    The target's logit is picked by comparison, not by index: that works as it stands on a vocabulary split over the
    mesh. `split`: the mesh axis that splits it, inside `on_each_device`."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    size = logits_BTV.shape[-1]
    first = 0 if split is None else size * jax.lax.axis_index(split)
    at_target = targets_BT[..., None] == first + jnp.arange(size, dtype=targets_BT.dtype)
    picked_BT = _over_vocabulary(jnp.sum(jnp.where(at_target, logits_BTV, 0), axis=-1), split)
    return jnp.where(mask_BT, _normalizers(logits_BTV, split) - picked_BT, 0)


def hits(
    logits_BTV: Float[Array, "*B V"],
    targets_BT: Int[Array, "*B"],
    mask_BT: Bool[Array, "*B"],
    split: Optional[str] = None,
) -> Bool[Array, "*B"]:
    """Whether the target's logit is higher than every other; false where masked. `split` as for `cross_entropies`."""
    size = logits_BTV.shape[-1]
    first = 0 if split is None else size * jax.lax.axis_index(split)
    at_target = targets_BT[..., None] == first + jnp.arange(size, dtype=targets_BT.dtype)
    picked_BT = jnp.max(jnp.where(at_target, logits_BTV, -jnp.inf), axis=-1)
    others_BT = jnp.max(jnp.where(at_target, -jnp.inf, logits_BTV), axis=-1)
    if split is not None:
        picked_BT, others_BT = jax.lax.pmax((picked_BT, others_BT), split)
    return mask_BT & (picked_BT > others_BT)


def cross_entropy_sum(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Σ over unmasked positions of `cross_entropies`."""
    return jnp.sum(cross_entropies(logits_BTV, targets_BT, mask_BT))


def symmetric_kls(
    left_BTV: Float[Array, "*B V"],
    right_BTV: Float[Array, "*B V"],
    mask_BT: Bool[Array, "*B"],
    split: Optional[str] = None,
) -> Float[Array, "*B"]:
    """½ (KL(p‖q) + KL(q‖p)) of every position, nats, p and q being the softmax of the logits; 0 where masked. `split`
    as for `cross_entropies`."""
    wide = [logits.astype(jnp.float32) for logits in (left_BTV, right_BTV)]
    log_p, log_q = (logits - _normalizers(logits, split)[..., None] for logits in wide)
    divergence_BT = 0.5 * _over_vocabulary(jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1), split)
    return jnp.where(mask_BT, divergence_BT, 0)


def kls(
    left_BTV: Float[Array, "*B V"],
    right_BTV: Float[Array, "*B V"],
    mask_BT: Bool[Array, "*B"],
    split: Optional[str] = None,
) -> Float[Array, "*B"]:
    """KL(p‖q) of every position, as `symmetric_kls`."""
    wide = [logits.astype(jnp.float32) for logits in (left_BTV, right_BTV)]
    log_p, log_q = (logits - _normalizers(logits, split)[..., None] for logits in wide)
    divergence_BT = _over_vocabulary(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), split)
    return jnp.where(mask_BT, divergence_BT, 0)


def _normalizers(logits_BTV: Float[Array, "*B V"], split: Optional[str]) -> Float[Array, "*B"]:
    """log Σ exp(logits) over the whole vocabulary."""
    here_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    if split is None:
        return here_BT
    most_BT = jax.lax.pmax(jax.lax.stop_gradient(here_BT), split)
    return most_BT + jnp.log(_over_vocabulary(jnp.exp(here_BT - most_BT), split))


def _over_vocabulary(parts: Array, split: Optional[str]) -> Array:
    return parts if split is None else jax.lax.psum(parts, split)


def reinforce_sums(
    log_probability: Float[Array, "*R B T"],
    baseline: Float[Array, "*R B T"],
    reward_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "*R"], Float[Array, "*R"]]:
    """(Σ −(reward − baseline) · log π, Σ (reward − baseline)²) over unmasked tokens.

    The gradient of the first is that of REINFORCE (Williams 1992): it goes into log π alone. That of the second goes
    into the baseline alone. The reward has none."""
    policy, error = reinforce_terms(log_probability, baseline, reward_BT)
    of_unmasked = lambda each: jnp.where(mask_BT, each, 0).sum((-2, -1))  # noqa: E731
    return of_unmasked(policy), of_unmasked(error)


def load_balance(
    counts: Int[Array, "*U E"], probability_sum: Float[Array, "*U E"], tokens: Int[Array, "*U"], experts_per_token: int
) -> Float[Array, "*U"]:
    """E/k · Σ_e f_e · P_e for each unit of tokens: 1 when balanced, E/k when every token goes to the same k experts.

    f_e = pairs of e / tokens (so Σ f = k), P_e = mean probability. Gradients flow through P only. Shazeer et al. 2017
    in the form of Switch Transformers (arXiv:2101.03961, eq. 4–6), rescaled for k > 1. A unit without tokens gives 0.
    """
    tokens = jnp.maximum(tokens, 1).astype(jnp.float32)[..., None]
    num_experts = counts.shape[-1]
    fraction = jax.lax.stop_gradient(counts.astype(jnp.float32)) / tokens
    return num_experts / experts_per_token * jnp.sum(fraction * probability_sum / tokens, axis=-1)


def router_z_sum(logits_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]) -> Float[Array, ""]:
    """Σ over unmasked tokens of logsumexp(logits)² (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return jnp.sum(jnp.where(mask_GS, jnp.square(jax.nn.logsumexp(logits_GSE, axis=-1)), 0))


def squared_variation(values: Float[Array, "*U E"]) -> Float[Array, "*U"]:
    """CV² = variance / mean² over experts, 0 where all are alike, also where all are 0 (arXiv:1701.06538)."""
    return jnp.var(values, axis=-1) / (jnp.square(jnp.mean(values, axis=-1)) + 1e-10)


def smooth_load(
    clean: Float[Array, "*B E"],
    noisy: Float[Array, "*B E"],
    deviation: Float[Array, "*B E"],
    k: int,
    among_others: bool,
) -> Float[Array, "*B E"]:
    """P(clean_e + deviation_e · n > threshold_e) for n of N(0, 1): how likely e is among the k best when its noise is
    drawn anew and that of all others stays.

    The threshold is the k-th largest noisy logit, `among_others` of the experts beside e (Shazeer et al.,
    arXiv:1701.06538: an expert that is in has to beat the one after the last), else of all (V-MoE)."""
    num_experts = clean.shape[-1]
    if among_others and k == num_experts:
        return jnp.ones_like(clean)
    best = jax.lax.top_k(noisy, k + 1 if among_others else k)[0]
    threshold = best[..., k - 1 : k]
    if among_others:
        threshold = jnp.where(noisy > best[..., k:], best[..., k:], threshold)
    return jax.scipy.special.ndtr((clean - threshold) / deviation)
