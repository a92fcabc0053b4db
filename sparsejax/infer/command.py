"""The `generate` command: restore a run's parameters, continue prompts, print."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Optional

import jax

from sparsejax.base.config import Loaded
from sparsejax.base.errors import RequestError
from sparsejax.base.sharding import make_mesh
from sparsejax.data.tokenizers import load_tokenizer
from sparsejax.infer.early_exit import RULES, EarlyExit
from sparsejax.infer.generate import Decoding
from sparsejax.infer.self_speculation import SelfSpeculation
from sparsejax.infer.text import START, Sample, encode_prompts, sample_text
from sparsejax.train.config import ExperimentConfig
from sparsejax.train.record import check_tokenizer
from sparsejax.train.restore import restore_variables


def generate_command(loaded: Loaded[ExperimentConfig], workdir: Optional[Path], args: argparse.Namespace) -> int:
    """Continues the prompts with the newest good checkpoint of `workdir` (or `--step`). Returns the exit status.

    Text goes to standard output, what it took to standard error. With `--format=json` the last line of standard output
    is an object with `step`, `samples` (each `prompt`, `text`: prompt and continuation, `tokens`: ids of the
    continuation), `tokens_per_second` (of decoding, without compilation), what came of `exits` and `drafts` (null
    without), and the settings of the sampling.
    """
    assert workdir is not None  # the command line sees to it
    config = dataclasses.replace(loaded.config, mesh=loaded.config.mesh.resolve(jax.device_count()))
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(workdir, tokenizer.fingerprint)
    prompts = read_prompts(args.prompt, args.prompts_file)
    encode_prompts(tokenizer, prompts)  # a bad prompt is told before anything is restored
    settings = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "seed")}
    decoding = read_decoding(args)
    if decoding is not None:
        decoding.check(config.model)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        variables, _, step = restore_variables(config, workdir, mesh, args.step)
        result = sample_text(config, variables, tokenizer, prompts, decoding=decoding, **settings)
    if args.format == "json":
        print(json.dumps({"step": step, **dataclasses.asdict(result), **settings}))
    else:
        print(as_text(result.samples))
        sampled = f"{len(prompts)} × {args.max_tokens} tokens"
        print(f"step {step}: {sampled}, {result.tokens_per_second:,.0f} tokens/s", file=sys.stderr)
        if result.exits is not None:
            print(f"layers run: {result.exits['mean_layer']:.2f} on average", file=sys.stderr)
        if result.drafts is not None:
            print(f"tokens a round: {result.drafts['mean_tokens']:.2f} on average", file=sys.stderr)
    return 0


def read_decoding(args: argparse.Namespace) -> Optional[Decoding]:
    """How the flags want tokens decoded. Raises `RequestError` for a flag without what it belongs to."""
    monotone = args.exit_policy == "monotone"
    exits = {"rule": args.exit_rule, "threshold": args.exit_threshold, "decay": args.exit_decay}
    if monotone:
        for name, value in exits.items():
            if value is not None:
                raise RequestError(f"--exit-{name} has no effect with --exit-policy=monotone, which asks no rule")
    elif args.exit_rule is None:
        for name in ("threshold", "policy", "decay"):
            if getattr(args, f"exit_{name}") is not None:
                raise RequestError(f"--exit-{name} has no effect without --exit-rule ({', '.join(RULES)})")
    if args.draft_layers is None and args.draft_length is not None:
        raise RequestError("--draft-length has no effect without --draft-layers")
    if args.draft_layers is not None and (monotone or args.exit_rule is not None):
        raise RequestError("--draft-layers with early exits: drafts are checked by all layers, exits are not")
    given = {**exits, "keys": args.exit_policy}
    if monotone or args.exit_rule is not None:
        return EarlyExit(**{name: value for name, value in given.items() if value is not None})
    if args.draft_layers is not None:
        length = {} if args.draft_length is None else {"length": args.draft_length}
        return SelfSpeculation(layers=args.draft_layers, **length)
    return None


def read_prompts(given: list[str], file: Optional[Path]) -> list[str]:
    """The prompts of the command line, then those of the file, one a line; a new line if there are neither.

    Raises:
      RequestError: the file cannot be read, or has an empty line.
    """
    if file is None:
        return given or [START]
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise RequestError(f"--prompts-file={file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RequestError(f"--prompts-file={file}: is not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if not line:
            raise RequestError(f"--prompts-file={file}: line {number} is empty; it should have a prompt a line")
    return [*given, *lines]


def as_text(samples: list[Sample]) -> str:
    """One sample bare; several under a heading each."""
    if len(samples) == 1:
        return samples[0].text
    return "\n\n".join(f"───── {n} of {len(samples)} ─────\n{sample.text}" for n, sample in enumerate(samples, 1))
