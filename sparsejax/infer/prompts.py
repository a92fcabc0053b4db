"""Prompts of different lengths as one batch on the mesh."""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, UInt32

from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import BATCH_AXES
from sparsejax.base.structs import Batch, struct

SHORTEST = 16
"""Prompts are padded to this many tokens or the next power of two, so that few programs are compiled."""


@struct
class Prompts:
    """Prompts without their last tokens, which decoding begins with; padded on the right. Integers are int32."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]  # of `tokens` without padding: the position of the prompt's last token
    last: Int[Array, " B"]
    before: Int[Array, " B"]  # the token before the last, −1 where there is none
    real: Bool[Array, " B"]  # False for rows that only fill the mesh
    salts: UInt32[Array, " B"]  # what a row's samples depend on beside the seed


def check_prompts(prompts: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises `RequestError` unless there are prompts, each with tokens, all of them in [0, vocab_size)."""
    if not prompts:
        raise RequestError("there is no prompt")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise RequestError(f"prompt {number} has no tokens; at least one is needed to continue from")
        for token in (int(np.min(prompt)), int(np.max(prompt))):
            if not 0 <= token < vocab_size:
                raise RequestError(f"prompt {number} has token id {token}; the model has 0 … {vocab_size - 1}")


def place_prompts(prompts: Sequence[np.ndarray], mesh: jax.sharding.Mesh) -> Prompts:
    """Prompts that passed `check_prompts` as one batch, with rows added until they divide evenly over `mesh`.

    A row's salt comes from its tokens and the number of equal prompts before it: no other row changes its samples, and
    a prompt given twice has two continuations.
    """
    shards = mesh.shape["data"] * mesh.shape["expert"]
    rows = -(-len(prompts) // shards) * shards
    longest = max(len(prompt) for prompt in prompts) - 1
    padded = max(SHORTEST, 1 << max(longest - 1, 0).bit_length())
    tokens_BT, salts_B = np.zeros((rows, padded), np.int32), np.zeros(rows, np.uint32)
    lengths_B, last_B, before_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    seen: Counter[bytes] = Counter()
    for row, prompt in enumerate(prompts):
        *start, last_B[row] = prompt
        tokens_BT[row, : len(start)], lengths_B[row] = start, len(start)
        before_B[row] = start[-1] if start else -1
        content = np.asarray(prompt, np.int32).tobytes()
        salts_B[row] = zlib.crc32(content, seen[content])
        seen[content] += 1
    real_B = np.arange(rows) < len(prompts)
    host = {
        "tokens": tokens_BT,
        "lengths": lengths_B,
        "last": last_B,
        "before": before_B,
        "real": real_B,
        "salts": salts_B,
    }
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return Prompts(**{name: jax.device_put(array, sharding) for name, array in host.items()})


def token_batch(
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    real_BT: Bool[Array, "B T"],
    previous_BT: Optional[Int[Array, "B T"]] = None,
) -> Batch:
    """A batch without targets, each row one document."""
    nothing = jnp.zeros_like(tokens_BT)
    return Batch(
        tokens=tokens_BT,
        targets=nothing,
        segments=real_BT.astype(jnp.int32),
        positions=positions_BT,
        loss_mask=nothing > 0,
        domains=nothing,
        rows=nothing[:, 0],
        previous=previous_BT,
    )
