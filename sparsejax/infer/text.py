"""From prompts as text to samples as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np

from sparsejax.base.errors import RequestError
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.infer.generate import Generator, Variables
from sparsejax.infer.sampling import Sampling
from sparsejax.train.config import ExperimentConfig

START = "\n"
"""The prompt where none is given: the next token begins a line."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One continued prompt."""

    prompt: str
    text: str  # prompt and continuation
    tokens: list[int]  # ids of the continuation


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Continued prompts, in the order of the prompts."""

    samples: list[Sample]
    tokens_per_second: float  # of decoding, all prompts together; without compilation


def sample_text(
    config: ExperimentConfig,
    state: Variables,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: Optional[int] = None,
    top_p: Optional[float] = None,
    seed: int = 0,
) -> Samples:
    """Continues every prompt (`START` if there is none) by `max_tokens` tokens. Needs the state's mesh to be set.

    Raises:
      RequestError: a prompt has no tokens or tokens the model lacks, or a number is out of range.
    """
    prompts = list(prompts) or [START]
    ids = encode_prompts(tokenizer, prompts)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    vocab_size = min(config.model.vocab_size, tokenizer.vocab_size)
    generation = Generator(config.model, sampling, vocab_size)(state, ids, max_tokens, seed)
    # Decoded together with the prompt: a character may begin in one and end in the other.
    samples = [
        Sample(prompt=prompt, text=tokenizer.decode(np.concatenate([start, tokens])), tokens=tokens.tolist())
        for prompt, start, tokens in zip(prompts, ids, generation.tokens, strict=True)
    ]
    return Samples(samples=samples, tokens_per_second=generation.tokens_per_second)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    """The token ids of each prompt, int32. Raises `RequestError` for one that has none."""
    ids = [np.asarray(tokenizer.encode(prompt), np.int32) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not len(tokens):
            raise RequestError(f"--prompt={prompt!r} has no tokens under this tokenizer; it takes at least one")
    return ids
