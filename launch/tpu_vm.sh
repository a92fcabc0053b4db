#!/usr/bin/env bash
# python -m sparsejax launch tpu-vm --site=launch/sites/tpu_vm.txt --config=configs/quickstart.py --config.model.blocks.moe.group_size=512 --mesh=4,4,1 --config.data.batch_size=64 --topology=v5p:2x2x2 --slices=2 --spot --workdir=/mnt/runs/quickstart
# Deletes the slice when the training is finished or has failed for good; stopped before that, it leaves the slice as it
# is, and goes on with it when it is started again.
set -u
slice=quickstart
place=(--project=lab --zone=us-east5-a)
resources=(gcloud compute tpus queued-resources)
command -v gcloud >/dev/null || { echo "failed: there is no gcloud here" >&2; exit 1; }
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

# What each host runs.
IFS= read -r -d '' worker <<'WORKER' || :
set -eu
# What an earlier connection left running saves and ends first.
if [ -e /dev/shm/quickstart.pid ] && kill "$(cat /dev/shm/quickstart.pid)" 2>/dev/null; then
  while kill -0 "$(cat /dev/shm/quickstart.pid)" 2>/dev/null; do sleep 1; done
fi
if ! mountpoint --quiet /mnt/runs; then
  command -v mount.nfs >/dev/null || sudo apt-get install --quiet --yes nfs-common
  sudo mkdir -p /mnt/runs
  sudo mount -t nfs 10.0.0.2:/export /mnt/runs
fi
cd /mnt/runs/sparsejax
python3 -m pip install --quiet --editable .
export LIBTPU_INIT_ARGS='--xla_tpu_enable_latency_hiding_scheduler=true --xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true --xla_tpu_enable_async_all_to_all=true --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true'
echo "$$" >/dev/shm/quickstart.pid
exec python3 -m sparsejax train --config=configs/quickstart.py --workdir=/mnt/runs/quickstart --mesh=4,4,1 --config.model.blocks.moe.group_size=512 --config.data.batch_size=64 --expect-processes=4 --stopped-status=75 --distributed=tpu
WORKER

# Prints nothing where there is no slice. Any other error, such as one of the network, says nothing about it.
state() {
  until "${resources[@]}" describe "$slice" "${place[@]}" --format='value(state.state)' 2>"$errors"; do
    grep -q NOT_FOUND "$errors" && return
    cat "$errors" >&2
    sleep 30
  done
}

failures=0
while :; do
  case "$(state)" in
    ACTIVE)
      "${resources[@]}" ssh "$slice" "${place[@]}" --quiet --node=all --worker=all --command="$worker"
      status=$?
      case "$status" in
        0 | 2) break ;;
        75 | 143) ;; # a signal stopped the run, which has saved and is to go on
        *)
          sleep 60 # until a slice that was taken away says so, which is no failure of the run
          if [ "$(state)" = ACTIVE ]; then
            failures=$((failures + 1))
            echo "failure $failures: status $status" >&2
            [ "$failures" -le 3 ] || break
          fi
          ;;
      esac
      ;;
    FAILED)
      "${resources[@]}" describe "$slice" "${place[@]}" >&2
      status=1
      break
      ;;
    SUSPENDED) "${resources[@]}" delete "$slice" "${place[@]}" --quiet --force ;;
    '')
      "${resources[@]}" create "$slice" "${place[@]}" \
        --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=quickstart --spot ||
        [ -n "$(state)" ] || exit 1 # else it was made, and only the answer was lost
      ;;
  esac
  sleep 30
done
"${resources[@]}" delete "$slice" "${place[@]}" --quiet --force
exit "$status"
