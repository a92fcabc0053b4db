"""A whole decoder or encoder, from its parameters as nested dicts of arrays: pre-norm blocks, NumPy float64, no JAX."""

from typing import Any, Optional

import numpy as np

from reference import moe as slow_moe
from reference.attention import attention, rope

Params = dict[str, Any]


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    """x over its root mean square along the last axis (arXiv:1910.07467)."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def soft_cap(x: np.ndarray, cap: Optional[float]) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def self_attention(params: Params, x: np.ndarray, arrays: dict[str, np.ndarray], config: Any) -> np.ndarray:
    q, k, v = (np.einsum("btd,dnh->btnh", x, params[name]["weight"]) for name in "qkv")
    if config.qk_norm:
        q = rms_norm(q, params["q_norm"]["scale"], config.norm_epsilon)
        k = rms_norm(k, params["k_norm"]["scale"], config.norm_epsilon)
    q, k = (rope(a, arrays["positions"], config.rope_theta) for a in (q, k))
    attended = attention(q, k, v, arrays["segments"], config.attention_soft_cap, config.causal)
    return np.einsum("btnh,nhd->btd", attended, params["out"]["weight"])


def feed_forward(params: Params, x: np.ndarray, mask: np.ndarray, moe: dict[str, Any]) -> np.ndarray:
    """The dense part, or the experts with the settings `moe` of `reference.moe.Layer`."""
    if "mlp" in params:
        weights = {name: layer["weight"] for name, layer in params["mlp"].items()}
        return slow_moe.feed_forward(x, **weights)
    layer = slow_moe.Layer(router=params["router"]["weight"], **params["experts"], **moe)
    return slow_moe.forward(layer, x, mask).y


def logits(
    params: Params, blocks: list[Params], arrays: dict[str, np.ndarray], config: Any, moe: dict[str, Any]
) -> np.ndarray:
    """[B, T, V]. `blocks` are the parameters of every block, from the input of the model to its output."""
    mask = arrays["segments"] > 0
    table = params["embedding"]["table"]
    x = np.sqrt(table.shape[1]) * table[arrays["tokens"]]
    for params_of_block in blocks:
        x = block(params_of_block, x, arrays, config, mask, moe)
    return scores(params, x, config)


def block(
    params: Params, x: np.ndarray, arrays: dict[str, np.ndarray], config: Any, mask: np.ndarray, moe: dict[str, Any]
) -> np.ndarray:
    normed = rms_norm(x, params["attention_norm"]["scale"], config.norm_epsilon)
    x = x + self_attention(params["attention"], normed, arrays, config)
    normed = rms_norm(x, params["feed_forward_norm"]["scale"], config.norm_epsilon)
    return x + feed_forward(params["feed_forward"], normed, mask, moe)


def scores(params: Params, x: np.ndarray, config: Any) -> np.ndarray:
    """Of what the last layer gives."""
    head = params["head"]["weight"] if "head" in params else params["embedding"]["table"].T
    return soft_cap(rms_norm(x, params["final_norm"]["scale"], config.norm_epsilon) @ head, config.logit_soft_cap)
