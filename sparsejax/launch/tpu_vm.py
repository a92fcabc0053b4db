"""A queued resource of Cloud TPU: asked for, trained on, and asked for again when it was taken away.

The script runs on any machine with gcloud, for as long as the training takes, and may itself be stopped and started."""

import argparse
import re
import shlex

from sparsejax.base.errors import RequestError
from sparsejax.launch.job import (
    KILLED,
    STOPPED,
    WRONG,
    Rendered,
    Request,
    check_value,
    default_name,
    exports,
    shared_folder,
)
from sparsejax.launch.topology import Tpu, parse_slice
from sparsejax.launch.xla_flags import environment

WORKER = """\
set -eu
# What an earlier connection left running saves and ends first.
if [ -e {pid} ] && kill "$(cat {pid})" 2>/dev/null; then
  while kill -0 "$(cat {pid})" 2>/dev/null; do sleep 1; done
fi
if ! mountpoint --quiet {path}; then
  command -v mount.nfs >/dev/null || sudo apt-get install --quiet --yes nfs-common
  sudo mkdir -p {path}
  sudo mount -t nfs {share} {path}
fi
{prepare}
echo "$$" >{pid}
exec {train}
"""

SCRIPT = """\
#!/usr/bin/env bash
{comment}
# Deletes the slice when the training is finished or has failed for good; stopped before that, it leaves the slice as it
# is, and goes on with it when it is started again.
set -u
slice={name}
place=({place})
resources=(gcloud compute tpus queued-resources)
command -v gcloud >/dev/null || {{ echo "failed: there is no gcloud here" >&2; exit 1; }}
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

# What each host runs.
IFS= read -r -d '' worker <<'{end}' || :
{worker}{end}

# Prints nothing where there is no slice. Any other error, such as one of the network, says nothing about it.
state() {{
  until "${{resources[@]}}" describe "$slice" "${{place[@]}}" --format='value(state.state)' 2>"$errors"; do
    grep -q NOT_FOUND "$errors" && return
    cat "$errors" >&2
    sleep 30
  done
}}

failures=0
while :; do
  case "$(state)" in
    ACTIVE)
      "${{resources[@]}}" ssh "$slice" "${{place[@]}}" --quiet --node=all --worker=all --command="$worker"
      status=$?
      case "$status" in
        0 | {wrong}) break ;;
        {stopped} | {killed}) ;; # a signal stopped the run, which has saved and is to go on
        *)
          sleep 60 # until a slice that was taken away says so, which is no failure of the run
          if [ "$(state)" = ACTIVE ]; then
            failures=$((failures + 1))
            echo "failure $failures: status $status" >&2
            [ "$failures" -le {restarts} ] || break
          fi
          ;;
      esac
      ;;
    FAILED)
      "${{resources[@]}}" describe "$slice" "${{place[@]}}" >&2
      status=1
      break
      ;;
    SUSPENDED) "${{resources[@]}}" delete "$slice" "${{place[@]}}" --quiet --force ;;
    '')
      "${{resources[@]}}" create "$slice" "${{place[@]}}" \\
        {create} ||
        [ -n "$(state)" ] || exit 1 # else it was made, and only the answer was lost
      ;;
  esac
  sleep 30
done
"${{resources[@]}}" delete "$slice" "${{place[@]}}" --quiet --force
exit "$status"
"""

ID, ALLOWED = r"[a-z]([a-z0-9-]*[a-z0-9])?", "a letter, then letters, digits and -, in lower case"


def render(request: Request, args: argparse.Namespace) -> Rendered:
    """The script that holds the loop."""
    piece = parse_slice(args.topology, gpus=False)
    tpu = piece.tpu
    if tpu is None or tpu.accelerator_type is None:
        raise RequestError(f"--topology={args.topology}: {piece.name} is to be had through GKE alone (launch jobset)")
    name = check_value("--name", args.name or default_name(request.stem), ID, ALLOWED)
    check_value("--zone", args.zone, ID, ALLOWED)
    check_value("--project", args.project, r"[a-z][a-z0-9.:-]*", "a letter, then letters, digits and - . :")
    share, path = shared_folder(request.workdir, args.volume, "HOST:/EXPORT:/PATH")
    if not re.fullmatch(r"[^:]+:/.*", share):
        raise RequestError(f"--volume={share}:{path}: not HOST:/EXPORT:/PATH, an export of an NFS server")
    processes = piece.hosts * args.slices
    train = [*request.train(processes, piece.devices, "tpu", args.slices), f"--stopped-status={STOPPED}"]
    train += ["--distributed=tpu"] if processes > 1 else []
    variables = environment("tpu", several=args.slices > 1) | dict(args.env)
    directory = [f"cd {shlex.quote(str(args.directory))}"] if args.directory else []
    worker = WORKER.format(
        pid=f"/dev/shm/{name}.pid",
        path=shlex.quote(str(path)),
        share=shlex.quote(share),
        prepare="\n".join([*directory, *args.setup, *exports(variables)]),
        train=shlex.join([args.python, *train]),
    )
    end = "WORKER"
    while end in worker.splitlines():  # a line of --setup
        end += "_"
    text = SCRIPT.format(
        comment=request.comment,
        name=name,
        place=shlex.join([f"--project={args.project}", f"--zone={args.zone}"]),
        worker=worker,
        end=end,
        create=shlex.join(_create(args, tpu, name, piece.hosts * piece.chips)),
        restarts=args.max_restarts,
        stopped=STOPPED,
        killed=KILLED,
        wrong=WRONG,
    )
    return Rendered(text=text, program=("bash", "-c"), from_stdin=False)


def _create(args: argparse.Namespace, tpu: Tpu, name: str, chips: int) -> list[str]:
    flags = [f"--accelerator-type={tpu.accelerator_type}-{chips * tpu.cores}"]
    flags += [f"--runtime-version={args.runtime_version or tpu.runtime}"]
    flags += [f"--node-id={name}"] if args.slices == 1 else [f"--node-count={args.slices}", f"--node-prefix={name}"]
    return flags + (["--spot"] if args.spot else [])
