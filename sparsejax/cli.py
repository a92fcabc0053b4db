"""The command line: `python -m sparsejax VERB [--config=FILE.py[:arg]] [--config.a.b=c ...] [--workdir=DIR] [...]`.

Parses flags, loads the config and hands over to the verb, whose code is imported only then.
"""

import argparse
import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsejax.base import flags
from sparsejax.base.errors import RequestError, did_you_mean, tell
from sparsejax.launch.flags import (
    START_TIMEOUT,
    TARGETS,
    begin_flags,
    launch_flags,
    read_target,
    start_timeout,
    top_parser,
)

VERBS = {
    "train": "train, or resume what --workdir holds",
    "eval": "restore a run and evaluate it, or compare meshes with --parity",
    "generate": "sample text from a run",
    "plan": "tables of parameters, FLOPs, memory and shardings; nothing is allocated",
    "launch": "print the job for local processes, SLURM, Kubernetes or a TPU VM; --submit runs it",
    "trace": "what recorded routing decisions would have dropped and moved under other settings",
    "ablate": "run a study: arms made equal, seeds, verdicts, a page",
    "report": "one page that shows runs, to be opened in a browser, offline",
}
READERS = ("trace", "report")
"""Verbs that look at what others left, and so take no config, no mesh and no processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 it failed, 2 the request was wrong, 130 interrupted."""
    try:
        with _warnings_on_stderr():
            return _command(list(sys.argv[1:] if argv is None else argv))
    except (Exception, KeyboardInterrupt) as error:
        return tell(error)


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
    target = None
    if verb == "launch":
        if rest[:1] in (["-h"], ["--help"]):
            top_parser().print_help()
            return 0
        target, rest = read_target(rest)
    rest, overrides = _split_overrides(rest)
    parser = _verb_parser(verb, target)
    args, unknown = parser.parse_known_args(rest, argparse.Namespace(target=target, words=argv))
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        flag = unknown[0].partition("=")[0]
        what = "unknown flag" if flag.startswith("-") else "unexpected argument"
        where = verb if target is None else f"{verb} {target}"
        raise RequestError(f"{what} {unknown[0]!r} for {where}; known: {', '.join(known)}.{did_you_mean(flag, known)}")
    if verb == "ablate":
        return _function("sparsejax.ablate.command", "ablate_command")(args, overrides)
    if verb in READERS:  # of files, which hold their config
        if overrides:
            raise RequestError(f"--config.{overrides[0][0]} has no effect on {verb}, which reads its config from files")
        if verb == "report":
            return _function("sparsejax.report.command", "report_command")(args)
        _function("sparsejax.base.devices", "prepare_devices")(1)
        return _function("sparsejax.plan.trace_command", "trace_command")(args)
    return _dispatch(verb, args, overrides)


def _dispatch(verb: str, args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    _refuse_inert_flags(verb, args)
    file = _config_file(verb, args)
    meshes: list[flags.Mesh] = args.mesh
    several = verb == "plan" or (verb == "eval" and args.parity)
    if len(meshes) > 1 and not several:
        raise RequestError(f"--mesh is given {len(meshes)} times; {verb} takes one mesh")
    if len(meshes) == 1 and not (verb == "eval" and args.parity):
        sizes = zip(("data", "expert", "tensor"), meshes[0], strict=True)
        overrides = [(f"mesh.{axis}", str(size)) for axis, size in sizes] + overrides

    from sparsejax.base.config import load
    from sparsejax.train.config import ExperimentConfig

    loaded = load(ExperimentConfig, file, overrides)
    if verb == "plan":  # which needs no devices, whatever the mesh
        return _function("sparsejax.plan.command", "plan_command")(loaded, args)
    workdir = args.workdir or Path("runs") / Path((file or "").partition(".py")[0]).name
    if verb == "launch":  # nor does this
        return _function("sparsejax.launch.command", "launch_command")(loaded, file, workdir, overrides, args)

    from sparsejax.base.cluster import find_place
    from sparsejax.base.devices import prepare_devices
    from sparsejax.base.job import job

    place = find_place(args)
    alone = "generate" if verb == "generate" else None
    if verb == "eval":
        given = {"parity": args.parity, "exit-table": args.exit_table, "exit-rule": args.exit_rule}
        alone = next((f"eval --{flag}" for flag, value in given.items() if value), None)
    if place is not None and alone is not None:
        raise RequestError(f"{alone} runs in one process, and this job has {place.num_processes}")
    mesh = loaded.config.mesh
    needed = [(mesh.data, mesh.expert, mesh.tensor), *meshes]
    # data = -1 stands for what the other axes leave, so it asks for no more devices than they do.
    count = max(max(data, 1) * expert * tensor for data, expert, tensor in needed)
    with job(place, args.start_timeout or START_TIMEOUT):
        prepare_devices(-(-count // (1 if place is None else place.num_processes)))
        if verb == "train":
            options = (args.allow_config_change, args.init_from, args.stopped_status)
            return _function("sparsejax.train.loop", "train")(loaded, workdir, *options)
        if verb == "eval" and args.exit_table is not None:
            return _function("sparsejax.infer.exit_evaluation", "exit_table_command")(loaded, args.workdir, args)
        if verb == "eval" and args.exit_rule is not None and loaded.config.model.head.of_tokens:
            return _function("sparsejax.infer.decoder_command", "exit_score_command")(loaded, args.workdir, args)
        if verb == "eval" and args.exit_rule is not None:
            return _function("sparsejax.infer.encoder_command", "encoder_exit_command")(loaded, args.workdir, args)
        if verb == "eval":
            return _function("sparsejax.train.evaluate", "evaluate_command")(loaded, args.workdir, args)
        return _function("sparsejax.infer.command", "generate_command")(loaded, args.workdir, args)


def _function(module: str, name: str) -> Callable[..., int]:
    return getattr(importlib.import_module(module), name)


def _refuse_inert_flags(verb: str, args: argparse.Namespace) -> None:
    if verb == "eval" and args.parity and args.step is not None:
        raise RequestError("--step has no effect with --parity, which restores no checkpoint")
    if verb == "eval" and args.parity:
        for flag in ("trace", "replay", "exit-table", "exit-rule", "exit-threshold", "exit-policy"):
            if getattr(args, flag.replace("-", "_")) is not None:
                raise RequestError(f"--{flag} has no effect with --parity")
    if verb == "eval" and args.exit_table is not None:
        for flag in ("trace", "replay"):
            if getattr(args, flag) is not None:
                raise RequestError(f"--{flag} has no effect with --exit-table, which writes no decisions")
        if args.exit_rule is not None:
            raise RequestError("--exit-rule has no effect with --exit-table, which asks every exit about every example")
    if verb == "eval" and args.exit_rule is not None:
        for flag in ("trace", "replay"):
            if getattr(args, flag) is not None:
                raise RequestError(f"--{flag} has no effect with --exit-rule, which records no decisions")
    if verb == "eval" and args.exit_rule is None:
        for flag in ("exit-threshold", "exit-policy"):
            if getattr(args, flag.replace("-", "_")) is not None:
                raise RequestError(f"--{flag} has no effect without --exit-rule")
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
    begins = verb in ("train", "launch")
    if saved is not None and not is_run and not begins:
        raise RequestError(f"--workdir={args.workdir}: not the folder of a run (it has no config.json)")
    if args.config is None and not is_run and begins:
        raise RequestError(f"{verb} needs --config=FILE.py (configs/quickstart.py is the default experiment)")
    if args.config is not None and begins and saved is None and args.config.endswith(".json"):
        raise RequestError(
            f"{verb} --config={args.config} needs --workdir=DIR: the same run resumes it, another repeats it"
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


def _top_parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<10} {does}" for verb, does in VERBS.items())
    return flags.Parser(
        prog="sparsejax",
        usage="sparsejax VERB [--config=FILE.py[:arg]] [--config.KEY=VALUE ...] [--workdir=DIR] [...]",
        description=f"Train, evaluate and plan models with conditional computation.\n\nverbs:\n{verbs}",
        epilog="`sparsejax VERB --help` lists a verb's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _verb_parser(verb: str, target: str | None = None) -> argparse.ArgumentParser:
    words, does = (verb, VERBS[verb]) if target is None else (f"{verb} {target}", TARGETS[target])
    parser = flags.Parser(prog=f"sparsejax {words}", description=does, allow_abbrev=False)
    add = parser.add_argument
    if verb not in (*READERS, "ablate"):
        _run_flags(verb, add)
    if verb in ("train", "eval", "generate"):
        _process_flags(add)
    if target is None:
        _FLAGS[verb](add)
    else:
        launch_flags(target, add)
    return parser


def _run_flags(verb: str, add: Callable[..., Any]) -> None:
    source = "a Python file with get_config(), or a run's config.json (default: that of --workdir"
    otherwise = ", else the defaults of every setting)" if verb in ("eval", "plan") else ")"
    add("--config", metavar="FILE[:arg]", help=source + otherwise)
    # Documents what `_split_overrides` takes out before this parser sees it.
    add("--config.KEY", metavar="VALUE", help="override one value, for example --config.train.steps=50; repeatable")
    default = " (default: runs/NAME for --config=NAME.py)" if verb in ("train", "launch") else ""
    add("--workdir", type=flags.folder, metavar="DIR", help=f"folder of the run{default}")
    add("--mesh", type=flags.mesh, action="append", default=[], metavar="D,E,T", help=_MESH_HELP[verb])


def _process_flags(add: Callable[..., Any]) -> None:
    add("--coordinator", type=flags.address, metavar="HOST:PORT", help="of several processes: where process 0 listens")
    add("--num-processes", type=flags.whole(1), metavar="N", help="of several processes: how many")
    add("--process-id", type=flags.whole(0), metavar="I", help="of several processes: which one this is, from 0")
    add(
        "--distributed", choices=_CLUSTERS, help="several processes, which JAX finds by itself; none: this one is alone"
    )
    add("--expect-processes", type=flags.whole(1), metavar="N", help="refuse a job of another size")
    start_timeout(add)


def _train_flags(add: Callable[..., Any]) -> None:
    begin_flags(add)
    status = "exit status when a signal stops the run before its end (default: 0), for a script that is to resume it"
    add("--stopped-status", type=flags.stopped_status, default=0, metavar="N", help=status)


def _eval_flags(add: Callable[..., Any]) -> None:
    add("--step", type=flags.whole(0), help="checkpoint to restore (default: the newest)")
    add("--parity", action="store_true", help="compare loss, gradients and ledger on every --mesh with one device")
    add("--trace", type=flags.file, metavar="FILE", help="write the routers' decisions, token by token")
    table = "write what every exit says of every token, or row of a classifier, for rules and guarantees offline"
    add("--exit-table", type=flags.file, metavar="FILE.npz", help=table)
    add("--replay", type=flags.file, metavar="FILE", help="take the decisions of a trace again")
    rule = "rows of a classifier, tokens of a decoder leave at the first exit that satisfies it: max_prob, margin, …"
    add("--exit-rule", metavar="RULE", help=rule)
    of_rule = "of the rule (default: the rule's own); exits that have to agree with patience"
    add("--exit-threshold", type=flags.number(0, None), metavar="X", help=of_rule)
    add("--exit-policy", metavar="POLICY", help="what skipped layers of a decoder remember: as for generate")


def _generate_flags(add: Callable[..., Any]) -> None:
    add("--step", type=flags.whole(0), help="checkpoint to restore (default: the newest)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    add("--prompts-file", type=Path, metavar="FILE", help="a prompt per line")
    add("--max-tokens", type=flags.whole(1), default=200, help="tokens to sample after each prompt (default: 200)")
    add("--temperature", type=flags.number(0, None), default=1.0, help="0 takes the most likely token (default: 1)")
    add("--top-k", type=flags.whole(1), help="sample among the k likeliest tokens")
    add("--top-p", type=flags.number(0, 1), help="sample among the likeliest tokens of this total probability")
    add("--seed", type=flags.whole(0), default=0, help="(default: 0)")
    rule = "leave at the first exit that satisfies it: max_prob, margin, entropy, state_similarity, patience"
    add("--exit-rule", metavar="RULE", help=rule)
    add("--exit-threshold", type=flags.number(0, None), metavar="X", help="of the rule (default: 0.9); 1 never leaves")
    keys = "what skipped layers remember: propagate (default), recompute, evict, share; monotone: depth by a schedule"
    add("--exit-policy", metavar="POLICY", help=keys)
    add("--exit-decay", type=flags.number(0, None), metavar="TAU", help="lower the threshold of later tokens")
    add("--draft-layers", type=flags.whole(1), metavar="E", help="draft with the first E layers, check with the rest")
    add("--draft-length", type=flags.whole(1), metavar="M", help="tokens of a draft (default: 4)")
    add("--format", choices=("text", "json"), default="text", help="(default: text)")


def _plan_flags(add: Callable[..., Any]) -> None:
    pods = "v5e:4x4 (TPUs) or h100:2x8 (hosts × GPUs)"
    add("--topology", metavar="KIND:NxM", help=f"compile the step for such a pod by its real compiler, as {pods}")
    search = "rank all meshes of the topology by predicted step time and compile the best N (default: 3)"
    room = "the buffer_factor with which dropless blocks drop at most P %% of their pairs"
    add("--imbalance", type=flags.number(0, 100), metavar="P", help=room)
    load = "with --imbalance: even (default), zipf:A, one:F, or a run's routing/STEP.npz or trace"
    add("--load", metavar="LOAD", help=load)
    add("--search", type=flags.whole(0), nargs="?", const=3, metavar="N", help=search)
    add("--format", choices=("table", "json"), default="table", help="(default: table)")


def _ablate_flags(add: Callable[..., Any]) -> None:
    add("study", type=flags.file, metavar="STUDY.py", help="defines STUDY, a sparsejax.ablate.Study")
    add("--workdir", type=flags.folder, required=True, metavar="DIR", help="folder of the study's runs")
    add("--arms", type=flags.words, metavar="A,B,…", help="only these, and the base")
    add("--seeds", type=flags.numbers, metavar="N,N,…", help="in place of the study's")
    add("--scale", metavar="NAME", help="another size of the study, by its name there")
    add("--jobs", type=flags.whole(1), metavar="N", help="runs at once (default: by cores and memory)")
    clusters = "let a cluster do the runs, as in --launch='slurm --nodes=2'; the same command again collects them"
    add("--launch", metavar="TARGET …", help=clusters)
    add("--out", type=flags.folder, metavar="DIR", help="folder for a second copy of the page and its figures")
    add("--dry-run", action="store_true", help="print arms, sizes, flags and power; run nothing")
    add("--config.KEY", metavar="VALUE", help="override one value of every arm; repeatable")


def _trace_flags(add: Callable[..., Any]) -> None:
    add("file", type=flags.file, metavar="FILE.npz", help="what eval --trace or train.trace wrote")
    add("--capacity-factor", type=flags.number(0, None), metavar="X", help="another capacity factor")
    add("--k", type=flags.whole(1), metavar="N", help="only the first N choices of a token")
    add("--group-size", type=flags.whole(1), metavar="N", help="groups of so many tokens")
    add("--order", metavar="NAME", help="another order in which slots are filled")
    add("--devices", type=flags.whole(1), metavar="N", help="devices along the mesh axis expert")
    add("--placement", type=flags.devices, metavar="D,D,…", help="the device of each expert (default: equal blocks)")
    add("--format", choices=("table", "json"), default="table", help="(default: table)")


def _report_flags(add: Callable[..., Any]) -> None:
    add("runs", type=flags.folder, nargs="*", metavar="RUN", help="folder of a run; several are shown side by side")
    add("--compare", action="store_true", help="print the first step, layer and token at which two runs part")
    add("--out", type=flags.file, metavar="FILE", help="the page (default: report.html in the first run's folder)")


_FLAGS = {
    "train": _train_flags,
    "eval": _eval_flags,
    "generate": _generate_flags,
    "plan": _plan_flags,
    "trace": _trace_flags,
    "ablate": _ablate_flags,
    "report": _report_flags,
}
_CLUSTERS = ("slurm", "ompi", "k8s", "tpu", "auto", "none")
_ONE_MESH = "devices along data, expert and tensor; short for --config.mesh.*"
_MESH_HELP = dict.fromkeys(VERBS, _ONE_MESH) | {
    "eval": f"{_ONE_MESH}; with --parity repeatable",
    "plan": f"{_ONE_MESH}; repeatable: the meshes to compare",
}
