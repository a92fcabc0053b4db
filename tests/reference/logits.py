"""Router logits from the equations, one token and one expert at a time, in NumPy float64."""

import math

import numpy as np


def linear(x: np.ndarray, parameters: dict) -> np.ndarray:
    """[E]: x W."""
    weight = parameters["weight"]
    return np.array([sum(x[d] * weight[d, e] for d in range(len(x))) for e in range(weight.shape[1])])


def cosine(x: np.ndarray, parameters: dict, lowest: float) -> np.ndarray:
    """[E]: cosine of P x and w_e over τ (arXiv:2204.09179)."""
    seen = linear(x, {"weight": parameters["projection"]})
    tau = max(math.exp(-parameters["log_scale"][0]), lowest)
    found = []
    for expert in parameters["weight"].T:
        found.append(float(seen @ expert) / math.sqrt(float(seen @ seen) * float(expert @ expert)) / tau)
    return np.array(found)


def product_key(x: np.ndarray, parameters: dict) -> np.ndarray:
    """[E]: q₁ · a_i + q₂ · b_j for i, then j (arXiv:1907.05242)."""
    query = linear(x, {"weight": parameters["query"]})
    first, second = query[: len(query) // 2], query[len(query) // 2 :]
    return np.array([float(first @ a + second @ b) for a in parameters["rows"].T for b in parameters["columns"].T])


def by_domain(domain: int, parameters: dict) -> np.ndarray:
    """[E]: v W for the vector v of the domain (arXiv:2110.03742)."""
    return linear(parameters["domains"][domain % len(parameters["domains"])], parameters)


def pooled(x_SD: np.ndarray, positions: np.ndarray, pool: str) -> np.ndarray:
    """[S, D]: what stands for its document at each token; a document begins where the position is 0."""
    found = []
    for t in range(len(x_SD)):
        first = max(s for s in range(t + 1) if positions[s] == 0)
        behind = [s for s in range(t + 1, len(x_SD)) if positions[s] == 0]
        until = {"first": first + 1, "prefix_mean": t + 1, "mean": behind[0] if behind else len(x_SD)}[pool]
        found.append(np.mean(x_SD[first:until], axis=0))
    return np.array(found)


def dselect_k(x: np.ndarray, parameters: dict, num_experts: int, gamma: float) -> np.ndarray:
    """[E]: Σ_j softmax(w)_j r(z_j) (arXiv:2106.03760)."""
    w = linear(x, {"weight": parameters["mixture"]})
    shares = np.array([1 / sum(math.exp(min(v - u, 700)) for v in w) for u in w])
    return shares @ selectors(x, parameters, num_experts, gamma)


def selectors(x: np.ndarray, parameters: dict, num_experts: int, gamma: float) -> np.ndarray:
    """[J, E]: r(z_j) of DSelect-k; codes from E on stand for the first experts."""
    number = parameters["mixture"].shape[1]
    z = linear(x, {"weight": parameters["codes"]}).reshape(number, -1)
    found = np.zeros((number, num_experts))
    for j in range(number):
        for code in range(2 ** z.shape[1]):
            product = 1.0
            for b, t in enumerate(z[j]):
                step = -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5
                step = 0.0 if t <= -gamma / 2 else 1.0 if t >= gamma / 2 else step
                product *= step if code >> b & 1 else 1 - step
            found[j, code % num_experts] += product
    return found
