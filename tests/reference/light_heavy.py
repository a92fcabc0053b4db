"""Light and heavy branches (CoLT5, arXiv:2303.09752) and conditional adapters (CoDA, arXiv:2304.04947), token by token,
NumPy float64. Weights are nested dicts by the names of the parameters."""

import math

import numpy as np

from reference.attention import rope
from reference.depths import best
from reference.estimators import soft_top_k


def normed(x, scale, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def network(x, weights):
    return gelu(x @ weights["w_in"]["weight"]) @ weights["w_out"]["weight"]


def choose(scores, valid, share, epsilon):
    """Weights of all tokens: of the k best those of the relaxation for 9/8 · k, 0 of the others."""
    k = min(len(scores), math.ceil(share * len(scores)))
    real = [t for t in range(len(scores)) if valid[t]]
    relaxed = np.ones(len(real)) if len(real) <= 9 / 8 * k else soft_top_k(scores[real], 9 / 8 * k, epsilon)
    weights, of = np.zeros(len(scores)), dict(zip(real, relaxed, strict=True))
    for t in best(scores, valid, k):
        weights[t] = of[t]
    return weights


def attend(x, keys, seen, positions, weights, theta=10_000.0):
    """Of every token x[t] to keys[s] with seen(t, s): zeros where there are none."""
    turn = lambda a: rope(a[None], positions[None], theta)[0]  # noqa: E731
    q = turn(np.einsum("td,dnh->tnh", x, weights["q"]["weight"]))
    k = turn(np.einsum("sd,dmh->smh", keys, weights["k"]["weight"]))
    v = np.einsum("sd,dmh->smh", keys, weights["v"]["weight"])
    heads, width = q.shape[1:]
    out = np.zeros(q.shape)
    for t in range(len(x)):
        among = [s for s in range(len(keys)) if seen(t, s)]
        for n in range(heads if among else 0):
            m = n // (heads // k.shape[1])
            e = np.exp([q[t, n] @ k[s, m] / math.sqrt(width) for s in among])
            out[t, n] = sum(each / e.sum() * v[s, m] for each, s in zip(e, among, strict=True))
    return np.einsum("tnh,nhd->td", out, weights["out"]["weight"])


def light_heavy(x, segments, positions, w, spec, causal=False):
    """One row through the block."""
    x, valid = x.astype(np.float64), segments > 0
    same = lambda t, s: segments[t] == segments[s] and (s <= t or not causal)  # noqa: E731
    score = lambda h, name: (h @ w[name]["weight"]["weight"])[:, 0]  # noqa: E731
    h = normed(x, w["attention_norm"]["scale"])
    q = choose(score(h, "query_chooser"), valid, spec.query_capacity, spec.epsilon)
    s = choose(score(h, "key_chooser"), valid, spec.key_capacity, spec.epsilon)
    light = attend(h, h, lambda t, u: same(t, u) and abs(t - u) <= spec.radius, positions, w["light_attention"])
    heavy = attend(h, s[:, None] * h, lambda t, u: same(t, u) and s[u] > 0, positions, w["heavy_attention"])
    x = x + light + q[:, None] * heavy
    h = normed(x, w["feed_forward_norm"]["scale"])
    f = choose(score(h, "token_chooser"), valid, spec.capacity, spec.epsilon)
    return x + network(h, w["light"]) + f[:, None] * network(h, w["heavy"])


def conditional_adapter(x, block, valid, w, settings):
    """One row; `block` of the chosen tokens and their places → what becomes of them, skip connection included."""
    h = normed(x.astype(np.float64), w["adapter_norm"]["scale"])
    weights = choose((h @ w["chooser"]["weight"]["weight"])[:, 0], valid, settings.capacity, settings.epsilon)
    y = x + gelu(h @ w["adapter"]["down"]["weight"]) @ w["adapter"]["up"]["weight"]
    chosen = np.flatnonzero(weights)
    contribution = block(x[chosen], chosen) - x[chosen]
    for place, t in enumerate(chosen):
        y[t] += weights[t] * contribution[place]
    return y
