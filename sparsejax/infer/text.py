"""From prompts as text to samples as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from sparsejax.base.errors import RequestError
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.infer.decode_cost import decode_flops
from sparsejax.infer.decoded import Generation, Variables
from sparsejax.infer.early_exit import EarlyExit
from sparsejax.infer.generate import Decoding, Generator
from sparsejax.infer.sampling import Sampling
from sparsejax.model.config import ModelConfig
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
    exits: Optional[dict[str, Any]] = None  # of early exits: `histogram` of layers run, their mean, FLOPs
    drafts: Optional[dict[str, Any]] = None  # of self-speculation: rounds by the tokens that they gave, and the mean


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
    decoding: Optional[Decoding] = None,
) -> Samples:
    """Continues every prompt (`START` if there is none) by `max_tokens` tokens. Needs the state's mesh to be set.

    Raises:
      RequestError: a prompt has no tokens or tokens the model lacks, or a number is out of range.
    """
    prompts = list(prompts) or [START]
    ids = encode_prompts(tokenizer, prompts)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    vocab_size = min(config.model.vocab_size, tokenizer.vocab_size)
    generation = Generator(config.model, sampling, vocab_size, decoding)(state, ids, max_tokens, seed)
    # Decoded together with the prompt: a character may begin in one and end in the other.
    samples = [
        Sample(prompt=prompt, text=tokenizer.decode(np.concatenate([start, tokens])), tokens=tokens.tolist())
        for prompt, start, tokens in zip(prompts, ids, generation.tokens, strict=True)
    ]
    return Samples(
        samples=samples,
        tokens_per_second=generation.tokens_per_second,
        exits=exits_taken(config.model, decoding, generation, [len(each) for each in ids]),
        drafts=drafts_kept(generation),
    )


def exits_taken(
    config: ModelConfig, decoding: Optional[Decoding], generation: Generation, lengths: Sequence[int]
) -> Optional[dict[str, Any]]:
    """How deep the tokens of a generation went, after prompts of these lengths."""
    if generation.depths is None or not isinstance(decoding, EarlyExit):
        return None
    depths, counts = np.unique(generation.depths, return_counts=True)
    return {
        "histogram": {str(depth): int(count) for depth, count in zip(depths, counts, strict=True)},
        "mean_layer": float(generation.depths.mean()),
        "flops": {**decode_flops(config, decoding, generation.depths, lengths), "compiled": generation.compiled_flops},
    }


def drafts_kept(generation: Generation) -> Optional[dict[str, Any]]:
    """Of the rounds of self-speculation, how many gave 1, 2, … tokens."""
    if generation.kept is None:
        return None
    rounds = generation.kept.sum(0)
    mean = float(rounds @ np.arange(1, len(rounds) + 1) / rounds.sum())
    return {"histogram": {str(n): int(count) for n, count in enumerate(rounds, 1)}, "mean_tokens": mean}


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    """The token ids of each prompt, int32. Raises `RequestError` for one that has none."""
    ids = [np.asarray(tokenizer.encode(prompt), np.int32) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not len(tokens):
            raise RequestError(f"--prompt={prompt!r} has no tokens under this tokenizer; it takes at least one")
    return ids
