#!/usr/bin/env bash
# python -m sparsejax launch local --config=configs/quickstart.py --config.model.blocks.moe.group_size=512 --processes=2 --devices=2 --mesh=2,2,1 --python=python
# Lines begin with the process they are from. TERM and Ctrl-C reach all through this script; they save and end.
# When one fails, the others are killed 55 seconds later; its exit status is the script's.
set -u
export JAX_PLATFORMS=cpu
export JAX_NUM_CPU_DEVICES=2
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=() stopped=0
# TERM for Ctrl-C, too: what a script starts in the background ignores that until it has a handler for it.
trap 'stopped=1; kill -TERM $(jobs -p) 2>/dev/null' INT TERM
for ((id = 0; id < 2 && !stopped; id++)); do
  python -m sparsejax train --config=configs/quickstart.py --workdir=runs/quickstart --mesh=2,2,1 --config.model.blocks.moe.group_size=512 --expect-processes=2 --coordinator="127.0.0.1:$port" --num-processes=2 --process-id="$id" > >(
    trap '' INT
    while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$id" "$line"; done
  ) 2>&1 &
  pids+=("$!")
done
[ "${#pids[@]}" -gt 0 ] || exit 143

status=0 deadline=
while [ "${#pids[@]}" -gt 0 ]; do
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
      continue
    fi
    wait "$pid"
    ended=$?
    if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$ended deadline=$((SECONDS + 55))
    fi
  done
  pids=(${running[@]+"${running[@]}"})
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ "${#pids[@]}" -gt 0 ]; then
    kill -KILL "${pids[@]}" 2>/dev/null
  fi
  sleep 0.2
done
exit "$status"
