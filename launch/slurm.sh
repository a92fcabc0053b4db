#!/usr/bin/env bash
# python -m sparsejax launch slurm --site=launch/sites/slurm.txt --config=configs/quickstart.py --config.model.blocks.moe.group_size=512 --mesh=4,4,1 --config.data.batch_size=64 --nodes=2
#SBATCH --job-name=quickstart
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --partition=gpu
#SBATCH --time=1-00:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --exclusive
set -u
export XLA_FLAGS='--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_pipelined_all_gather=true --xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_pipelined_all_reduce=true --xla_gpu_enable_while_loop_double_buffering=true'
source .venv/bin/activate

# Status 75: a signal stopped the run, which has saved and is to go on; 143: it had not begun.
# 2: the request is wrong. A process that ends leaves the others time to save (--kill-on-bad-exit=0).
for attempt in $(seq 0 3); do
  [ "$attempt" -eq 0 ] || sleep 10
  srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=12 python -m sparsejax train --config=configs/quickstart.py --workdir=runs/quickstart --mesh=4,4,1 --config.model.blocks.moe.group_size=512 --config.data.batch_size=64 --expect-processes=16 --stopped-status=75 --distributed=slurm
  status=$?
  case "$status" in
    0 | 2) exit "$status" ;;
    75 | 143)
      scontrol requeue "$SLURM_JOB_ID" && sleep 600 # until SLURM ends this script
      exit "$status"
      ;;
  esac
  echo "attempt $attempt: status $status" >&2
done
exit "$status"
