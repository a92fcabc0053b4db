"""The command line: `python -m sparsejax VERB [--config=FILE.py[:arg]] [--config.a.b=c ...] [--workdir=DIR] [...]`.

Parses flags, loads the config and hands over to the verb, whose code is imported only then.
"""

import argparse
import contextlib
import importlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparsejax.base.errors import RequestError, RunError, did_you_mean

VERBS = {
    "train": "train, or resume what --workdir holds",
    "eval": "restore a run and evaluate it, or compare meshes with --parity",
    "generate": "sample text from a run",
    "plan": "tables of parameters, FLOPs, memory and shardings; nothing is allocated",
    "trace": "what recorded routing decisions would have dropped and moved under other settings",
}
Mesh = tuple[int, int, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 it failed, 2 the request was wrong, 130 interrupted."""
    try:
        with _warnings_on_stderr():
            return _command(list(sys.argv[1:] if argv is None else argv))
    except RequestError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the last line of defence: a one-line cause, then the trace
        cause = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        sys.stderr.write(f"failed: {_one_line(cause)}\n{traceback.format_exc()}")  # one write: other threads may write
        return 1


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Prints the package's warnings as plain lines, once each, whatever handlers libraries give to the root logger."""
    logger, handler = logging.getLogger("sparsejax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _command(argv: list[str]) -> int:
    if not argv:
        raise RequestError(f"which verb? known: {', '.join(VERBS)}; --help says what they do")
    if argv[0] in ("-h", "--help"):
        _top_parser().print_help()
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise RequestError(f"unknown verb {verb!r}; known: {', '.join(VERBS)}.{did_you_mean(verb, VERBS)}")
    rest, overrides = _split_overrides(rest)
    parser = _verb_parser(verb)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        flag = unknown[0].partition("=")[0]
        what = "unknown flag" if flag.startswith("-") else "unexpected argument"
        raise RequestError(f"{what} {unknown[0]!r} for {verb}; known: {', '.join(known)}.{did_you_mean(flag, known)}")
    if verb == "trace":  # of a file, which holds its config
        if overrides:
            raise RequestError(
                f"--config.{overrides[0][0]} has no effect on trace, which reads its config from the file"
            )
        _function("sparsejax.base.devices", "prepare_devices")(1)
        return _function("sparsejax.plan.trace_command", "trace_command")(args)
    return _dispatch(verb, args, overrides)


def _dispatch(verb: str, args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    _refuse_inert_flags(verb, args)
    file = _config_file(verb, args)
    meshes: list[Mesh] = args.mesh
    several = verb == "plan" or (verb == "eval" and args.parity)
    if len(meshes) > 1 and not several:
        raise RequestError(f"--mesh is given {len(meshes)} times; {verb} takes one mesh")
    if len(meshes) == 1 and not (verb == "eval" and args.parity):
        sizes = zip(("data", "expert", "tensor"), meshes[0], strict=True)
        overrides = [(f"mesh.{axis}", str(size)) for axis, size in sizes] + overrides

    from sparsejax.base.config import load
    from sparsejax.base.devices import prepare_devices
    from sparsejax.train.config import ExperimentConfig

    loaded = load(ExperimentConfig, file, overrides)
    mesh = loaded.config.mesh
    needed = [(mesh.data, mesh.expert, mesh.tensor), *meshes]
    # data = -1 stands for what the other axes leave, so it asks for no more devices than they do.
    if verb != "plan":  # which needs no devices, whatever the mesh
        prepare_devices(max(max(data, 1) * expert * tensor for data, expert, tensor in needed))
    if verb == "train":
        assert file is not None  # `_config_file` sees to it
        workdir = args.workdir or Path("runs") / Path(file.partition(".py")[0]).name
        return _function("sparsejax.train.loop", "train")(loaded, workdir, args.allow_config_change, args.init_from)
    if verb == "eval":
        return _function("sparsejax.train.evaluate", "evaluate_command")(loaded, args.workdir, args)
    if verb == "generate":
        return _function("sparsejax.infer.command", "generate_command")(loaded, args.workdir, args)
    return _function("sparsejax.plan.command", "plan_command")(loaded, args)


def _function(module: str, name: str) -> Callable[..., int]:
    return getattr(importlib.import_module(module), name)


def _refuse_inert_flags(verb: str, args: argparse.Namespace) -> None:
    if verb == "eval" and args.parity and args.step is not None:
        raise RequestError("--step has no effect with --parity, which restores no checkpoint")
    if verb == "eval" and args.parity:
        for flag in ("trace", "replay"):
            if getattr(args, flag) is not None:
                raise RequestError(f"--{flag} has no effect with --parity")
    if verb == "generate" and args.temperature == 0:
        for flag, value in (("--top-k", args.top_k), ("--top-p", args.top_p)):
            if value is not None:
                raise RequestError(f"{flag} has no effect: temperature 0 takes the most likely token")


def _config_file(verb: str, args: argparse.Namespace) -> str | None:
    """`--config`, else the config.json of the run in `--workdir`, else None for the defaults of every setting."""
    saved = args.workdir / "config.json" if args.workdir is not None else None
    try:
        is_run = saved is not None and saved.is_file()
    except OSError as error:  # a folder on the way that may not be entered, a name that is too long
        raise RequestError(f"--workdir={args.workdir}: could not be read: {error.strerror}") from None
    if saved is None and (verb == "generate" or (verb == "eval" and not args.parity)):
        raise RequestError(f"{verb} needs --workdir=DIR, the folder of a run")
    if saved is not None and not is_run and verb != "train":
        raise RequestError(f"--workdir={args.workdir}: not the folder of a run (it has no config.json)")
    if args.config is None and not is_run and verb == "train":
        raise RequestError("train needs --config=FILE.py (configs/quickstart.py is the default experiment)")
    if args.config is not None and verb == "train" and saved is None and args.config.endswith(".json"):
        raise RequestError(
            f"train --config={args.config} needs --workdir=DIR: the same run resumes it, another repeats it"
        )
    if args.config is not None:
        return args.config
    return str(saved) if is_run else None


def _split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of `argv`: what is left, and (key, value) pairs."""
    others, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            others.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise RequestError(f"{word} needs a value: {word}=VALUE")
        overrides.append((key, value))
    return others, overrides


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `RequestError`s."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def _top_parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<10} {does}" for verb, does in VERBS.items())
    return _Parser(
        prog="sparsejax",
        usage="sparsejax VERB [--config=FILE.py[:arg]] [--config.KEY=VALUE ...] [--workdir=DIR] [...]",
        description=f"Train, evaluate and plan models with conditional computation.\n\nverbs:\n{verbs}",
        epilog="`sparsejax VERB --help` lists a verb's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _verb_parser(verb: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"sparsejax {verb}", description=VERBS[verb], allow_abbrev=False)
    add = parser.add_argument
    if verb != "trace":
        _run_flags(verb, add)
    _FLAGS[verb](add)
    return parser


def _run_flags(verb: str, add: Callable[..., Any]) -> None:
    source = "a Python file with get_config(), or a run's config.json (default: that of --workdir"
    otherwise = ", else the defaults of every setting)" if verb in ("eval", "plan") else ")"
    add("--config", metavar="FILE[:arg]", help=source + otherwise)
    # Documents what `_split_overrides` takes out before this parser sees it.
    add("--config.KEY", metavar="VALUE", help="override one value, for example --config.train.steps=50; repeatable")
    default = " (default: runs/NAME for --config=NAME.py)" if verb == "train" else ""
    add("--workdir", type=_folder, metavar="DIR", help=f"folder of the run{default}")
    add("--mesh", type=_mesh, action="append", default=[], metavar="D,E,T", help=_MESH_HELP[verb])


def _train_flags(add: Callable[..., Any]) -> None:
    add("--allow-config-change", action="store_true", help="resume although the config differs from the checkpoint's")
    add("--init-from", type=_folder, metavar="RUN", help="begin with the parameters of another run's newest checkpoint")


def _eval_flags(add: Callable[..., Any]) -> None:
    add("--step", type=_whole(0), help="checkpoint to restore (default: the newest)")
    add("--parity", action="store_true", help="compare loss, gradients and ledger on every --mesh with one device")
    add("--trace", type=_file, metavar="FILE", help="write the routers' decisions, token by token")
    add("--replay", type=_file, metavar="FILE", help="take the decisions of a trace again")


def _generate_flags(add: Callable[..., Any]) -> None:
    add("--step", type=_whole(0), help="checkpoint to restore (default: the newest)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    add("--prompts-file", type=Path, metavar="FILE", help="a prompt per line")
    add("--max-tokens", type=_whole(1), default=200, help="tokens to sample after each prompt (default: 200)")
    add("--temperature", type=_number(0, None), default=1.0, help="0 takes the most likely token (default: 1)")
    add("--top-k", type=_whole(1), help="sample among the k likeliest tokens")
    add("--top-p", type=_number(0, 1), help="sample among the likeliest tokens of this total probability")
    add("--seed", type=_whole(0), default=0, help="(default: 0)")
    add("--format", choices=("text", "json"), default="text", help="(default: text)")


def _plan_flags(add: Callable[..., Any]) -> None:
    pods = "v5e:4x4 (TPUs) or h100:2x8 (hosts × GPUs)"
    add("--topology", metavar="KIND:NxM", help=f"compile the step for such a pod by its real compiler, as {pods}")
    search = "rank all meshes of the topology by predicted step time and compile the best N (default: 3)"
    room = "the buffer_factor with which dropless blocks drop at most P %% of their pairs"
    add("--imbalance", type=_number(0, 100), metavar="P", help=room)
    load = "with --imbalance: even (default), zipf:A, one:F, or a run's routing/STEP.npz or trace"
    add("--load", metavar="LOAD", help=load)
    add("--search", type=_whole(0), nargs="?", const=3, metavar="N", help=search)
    add("--format", choices=("table", "json"), default="table", help="(default: table)")


def _trace_flags(add: Callable[..., Any]) -> None:
    add("file", type=_file, metavar="FILE.npz", help="what eval --trace or train.trace wrote")
    add("--capacity-factor", type=_number(0, None), metavar="X", help="another capacity factor")
    add("--k", type=_whole(1), metavar="N", help="only the first N choices of a token")
    add("--group-size", type=_whole(1), metavar="N", help="groups of so many tokens")
    add("--order", metavar="NAME", help="another order in which slots are filled")
    add("--devices", type=_whole(1), metavar="N", help="devices along the mesh axis expert")
    add("--placement", type=_devices, metavar="D,D,…", help="the device of each expert (default: equal blocks)")
    add("--format", choices=("table", "json"), default="table", help="(default: table)")


_FLAGS = {
    "train": _train_flags,
    "eval": _eval_flags,
    "generate": _generate_flags,
    "plan": _plan_flags,
    "trace": _trace_flags,
}
_ONE_MESH = "devices along data, expert and tensor; short for --config.mesh.*"
_MESH_HELP = dict.fromkeys(VERBS, _ONE_MESH) | {
    "eval": f"{_ONE_MESH}; with --parity repeatable",
    "plan": f"{_ONE_MESH}; repeatable: the meshes to compare",
}


def _devices(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not D,D,…: the number of a device for each expert")
    return tuple(map(int, numbers))


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is not a file")
    return Path(text)


def _folder(text: str) -> Path:
    if not text:  # of an unset variable, say, which would mean the current folder
        raise argparse.ArgumentTypeError("'' is not a folder")
    return Path(text)


def _mesh(text: str) -> Mesh:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.strip().lstrip("-").isdigit() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not D,E,T: three ints, for example 2,4,1")
    data, expert, tensor = map(int, sizes)
    return data, expert, tensor


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an int of at least {least}")
        return int(text)

    return whole


def _number(least: float, most: float | None) -> Callable[[str], float]:
    def number(text: str) -> float:
        wanted = f"a number of at least {least}" if most is None else f"a number from {least} to {most}"
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= (float("inf") if most is None else most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return number


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
