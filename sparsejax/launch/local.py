"""Processes on this machine's CPU, as on a cluster: each has devices of its own, and gloo carries what they send."""

import argparse
import shlex
import sys

from sparsejax.base.job import HEARD, HEARTBEAT
from sparsejax.launch.job import KILLED, Rendered, Request, exports

KILL_AFTER = 2 * HEARTBEAT + HEARD + 5
"""Seconds that the others have when one process has failed: to miss it, and to say of what they fail."""

SCRIPT = """\
#!/usr/bin/env bash
{comment}
# Lines begin with the process they are from. TERM and Ctrl-C reach all through this script; they save and end.
# When one fails, the others are killed {kill_after} seconds later; its exit status is the script's.
set -u
{exports}
{before}
pids=() stopped=0
# TERM for Ctrl-C, too: what a script starts in the background ignores that until it has a handler for it.
trap 'stopped=1; kill -TERM $(jobs -p) 2>/dev/null' INT TERM
for ((id = 0; id < {processes} && !stopped; id++)); do
  {train} > >(
    trap '' INT
    while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\\n' "$id" "$line"; done
  ) 2>&1 &
  pids+=("$!")
done
[ "${{#pids[@]}}" -gt 0 ] || exit {killed}

status=0 deadline=
while [ "${{#pids[@]}}" -gt 0 ]; do
  running=()
  for pid in "${{pids[@]}}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    wait "$pid"
    ended=$?
    if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$ended deadline=$((SECONDS + {kill_after}))
    fi
  done
  pids=(${{running[@]+"${{running[@]}}"}})
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ "${{#pids[@]}}" -gt 0 ]; then
    kill -KILL "${{pids[@]}}" 2>/dev/null
  fi
  sleep 0.2
done
exit "$status"
"""

COORDINATOR = """\
port=$({python} -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"""


def render(request: Request, args: argparse.Namespace) -> Rendered:
    """A script of bash that starts the processes and waits for them."""
    python = args.python or sys.executable
    train = shlex.join([python, *request.train(args.processes, args.devices, "cpu")])
    several = args.processes > 1
    if several:
        train += f' --coordinator="127.0.0.1:$port" --num-processes={args.processes} --process-id="$id"'
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices), **dict(args.env)}
    text = SCRIPT.format(
        comment=request.comment,
        kill_after=KILL_AFTER,
        killed=KILLED,
        exports="\n".join(exports(variables)),
        before=COORDINATOR.format(python=shlex.quote(python)) if several else "",
        processes=args.processes,
        train=train,
    )
    return Rendered(text=text, program=("bash", "-c"), from_stdin=False)
