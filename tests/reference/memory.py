"""Lookup layers one token at a time, from the papers' equations; NumPy and Python's integers, which do not overflow.

A row of a batch is a list of token ids and a list of document numbers, 0 for padding. −1 as an id of a row is none."""

import math

import numpy as np

WORD = 2**32


def before(segments: list[int], t: int, n: int) -> int | None:
    """The place n tokens before t, if it lies in the same document."""
    return t - n if t - n >= 0 and segments[t - n] == segments[t] > 0 else None


# addresses: the ids of one token


def finalised(value: int) -> int:
    """The finaliser of MurmurHash3, 32 bits."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B % WORD
    value = (value ^ (value >> 13)) * 0xC2B2AE35 % WORD
    return value ^ (value >> 16)


def mixed(left: int, right: int, seed: int) -> int:
    return finalised((finalised(left ^ seed) * 0x9E3779B1 + right) % WORD)


def hashed_id(token: int, hashes: int, buckets: int, seed: int) -> list[int]:
    return [h * buckets + mixed(token, h, seed) % buckets for h in range(hashes)]


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def primes(least: int, count: int) -> list[int]:
    found, n = [], least
    while len(found) < count:
        found += [n] if is_prime(n) else []
        n += 1
    return found


def n_grams(tokens, segments, t: int, orders, heads: int, buckets: int, multipliers: list[int]) -> list[int]:
    """Each order and head has a prime number of rows of its own; ids count from 1, and 0 is no id."""
    sizes, ids = primes(buckets, len(orders) * heads), []
    for i, order in enumerate(orders):
        mix = 0
        for n in range(order):
            place = before(segments, t, n)
            mix ^= (0 if place is None else tokens[place] + 1) * multipliers[n] % WORD
        for h in range(heads):
            table = i * heads + h
            ids.append(sum(sizes[:table]) + mix % sizes[table])
    return ids


def hyperplanes(x: np.ndarray, normals_HDb: np.ndarray) -> list[int]:
    tables, _, bits = normals_HDb.shape
    return [h * 2**bits + sum(2**s for s in range(bits) if float(x @ normals_HDb[h, :, s]) > 0) for h in range(tables)]


def euclidean(x, normals_HDb, offsets_Hb, width: float, buckets: int) -> list[int]:
    ids = []
    for h in range(len(normals_HDb)):
        hashed = 0
        for s in range(normals_HDb.shape[2]):
            cell = math.floor((float(x @ normals_HDb[h, :, s]) + float(offsets_Hb[h, s])) / width)
            hashed = mixed(hashed, cell % WORD, s)
        ids.append(h * buckets + hashed % buckets)
    return ids


def cross_polytope(x, normals_HDm) -> list[int]:
    columns, ids = normals_HDm.shape[2], []
    for h in range(len(normals_HDm)):
        corners = [float(x @ normals_HDm[h, :, m]) for m in range(columns)]
        corners += [-value for value in corners]
        ids.append(h * 2 * columns + corners.index(max(corners)))
    return ids


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def softmax_top_k(x, scores_DN, k: int, share: bool) -> tuple[list[int], list[float]]:
    p = softmax(x @ scores_DN)
    ids = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    total = sum(p[i] for i in ids) if share else 1.0
    return ids, [p[i] / total for i in ids]


def product_keys(x, query_DHq, sub_keys_2HNh, k: int, relu: bool, scale_Hq=None) -> tuple[list[int], list[float]]:
    """All keys² scores of each head; with a scale queries are normalised."""
    ids, weights = [], []
    _, heads, keys, half = sub_keys_2HNh.shape
    for h in range(heads):
        q = x @ query_DHq[:, h]
        q = q if scale_Hq is None else q / np.sqrt((q**2).mean() + 1e-6) * scale_Hq[h]
        scores = np.array(
            [
                q[:half] @ sub_keys_2HNh[0, h, i] + q[half:] @ sub_keys_2HNh[1, h, j]
                for i in range(keys)
                for j in range(keys)
            ]
        )
        best = np.argsort(-scores)[:k]
        ids += best.tolist()
        weights += np.maximum(scores[best], 0).tolist() if relu else softmax(scores[best]).tolist()
    return ids, weights


def clusters(x, centres_HCd) -> list[int]:
    """Of each part of x the nearest centre."""
    parts = x.reshape(len(centres_HCd), -1)
    return [
        int(np.argmin([((part - centre) ** 2).sum() for centre in centres]))
        for part, centres in zip(parts, centres_HCd, strict=True)
    ]


def latent_bigrams(codes_TH: list[list[int]], segments, t: int, clusters: int, buckets: int) -> list[int]:
    """((a x + a) mod p) mod buckets, a = head + 1; none for the first token of a document."""
    place, ids = before(segments, t, 1), []
    for h, prime in enumerate(primes(buckets + 1, len(codes_TH[0]))):
        if place is None:
            ids.append(-1)
        else:
            x = codes_TH[t][h] + clusters * codes_TH[place][h]
            ids.append(h * buckets + ((h + 1) * x + h + 1) % prime % buckets)
    return ids


def moved(running: np.ndarray, measured: np.ndarray, decay: float) -> np.ndarray:
    """Running sums [n, w + 1] after a step; a line that counted nothing stays."""
    lines = zip(running, measured, strict=True)
    return np.array([decay * old + (1 - decay) * new if new[-1] > 0 else old for old, new in lines])


# contents: the value of one token


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def vector(h, rows, weights, join: str) -> np.ndarray:
    scaled = [w * row for w, row in zip(weights, rows, strict=True)]
    return np.concatenate(scaled) if join == "concat" else sum(scaled)


def partial_expert(h, rows, weights, rank: int) -> np.ndarray:
    out = np.zeros_like(h)
    for w, row in zip(weights, rows, strict=True):
        a, b = row[: rank * len(h)].reshape(rank, -1), row[rank * len(h) :].reshape(rank, -1)
        out = out + w * sum(gelu(h @ a[r]) * b[r] for r in range(rank))
    return out


def key_values(h, rows, weights, pairs: int) -> np.ndarray:
    out = np.zeros_like(h)
    for w, row in zip(weights, rows, strict=True):
        keys, values = row[: pairs * len(h)].reshape(pairs, -1), row[pairs * len(h) :].reshape(pairs, -1)
        out = out + w * (softmax(keys @ h) @ values)
    return out


def key_values_together(h, rows, weights, pairs: int) -> np.ndarray:
    """Over the pairs of all rows, each with its row's weight."""
    total, out = 0.0, np.zeros(len(h))
    for w, row in zip(weights, rows, strict=True):
        keys, values = row[: pairs * len(h)].reshape(pairs, -1), row[pairs * len(h) :].reshape(pairs, -1)
        for key, value in zip(keys, values, strict=True):
            score = w * math.exp(float(key @ h))
            total, out = total + score, out + score * value
    return out / total if total else out


# consumptions: what is added to the stream of one row of tokens


def rms(x, scale, epsilon: float = 1e-6):
    return x / math.sqrt((x**2).mean() + epsilon) * scale


def concat(x, values, of_stream, of_value):
    """[x; value] W − x with W = [I + of_stream; of_value]."""
    w = np.concatenate([np.eye(len(of_stream)) + of_stream, of_value])
    return [np.concatenate([x[t], values[t]]) @ w - x[t] for t in range(len(x))]


def gated_output(h, values, w_gate, w_out):
    return [(values[t] * silu(h[t] @ w_gate)) @ w_out for t in range(len(h))]


def gated_add(h, values, segments, w_key, w_value, key_scale, value_scale, kernel, dilation: int):
    """(what is added, gates)."""
    v, gates = [], []
    for t in range(len(h)):
        s = float(h[t] @ rms(values[t] @ w_key, key_scale)) / math.sqrt(len(h[t]))
        gates.append(1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(s), 1e-6)), s))))
        v.append(gates[t] * (values[t] @ w_value))
    normed, out = [rms(v_t, value_scale) for v_t in v], []
    for t in range(len(h)):
        places = [(k, before(segments, t, k * dilation)) for k in range(len(kernel))]
        convolved = sum((kernel[k] * normed[place] for k, place in places if place is not None), np.zeros(len(h[t])))
        out.append(v[t] + silu(convolved))
    return out, gates


def per_layer(h, embedded, values, w_context, context_scale, w_gate, w_out, out_scale):
    out = []
    for t in range(len(h)):
        u = (rms(embedded[t] @ w_context, context_scale) + math.sqrt(len(values[t])) * values[t]) / math.sqrt(2)
        out.append(rms((gelu(h[t] @ w_gate) * u) @ w_out, out_scale))
    return out
