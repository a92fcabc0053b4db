"""Which job of several processes this one belongs to: from flags, or as JAX detects it."""

import argparse
import os
from dataclasses import dataclass
from typing import Optional

from jax._src import clusters

from sparsejax.base.errors import RequestError

TPU = (clusters.GkeTpuCluster, clusters.GceTpuCluster)
METHODS = {
    "slurm": (clusters.SlurmCluster,),
    "ompi": (clusters.OmpiCluster, clusters.Mpi4pyCluster),  # Open MPI 5 leaves too little in the environment
    "k8s": (clusters.K8sCluster,),
    "tpu": TPU,
    "auto": (clusters.OmpiCluster, clusters.SlurmCluster, *TPU, clusters.K8sCluster),
}
"""What `--distributed` may be → JAX's environments, of which the first present one is taken."""
ALONE = "none"

TASKS = {"SLURM_STEP_NUM_TASKS": "slurm", "OMPI_COMM_WORLD_SIZE": "ompi", "PMI_SIZE": "ompi"}
"""Variables in which launchers say how many processes they have started → the method for these."""
POD = "JOB_COMPLETION_INDEX"
"""The number, from 0, of a pod of a Kubernetes Job, which does not say of how many."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of this process among those of its job. What is None is for JAX to detect, by `method` if that is one of its own
    names: it has none for Kubernetes."""

    num_processes: int
    process_id: Optional[int] = None
    coordinator: Optional[str] = None
    method: Optional[str] = "deactivate"


def find_place(args: argparse.Namespace) -> Optional[Place]:
    """The place that the flags say, None for a process that is alone.

    Raises:
      RequestError: the flags contradict each other, the cluster is not there, the job is not of the size expected, or
        a launcher has started several processes that have not been told to be one job: each would be a whole run.
    """
    place = _by_flags(args)
    if place is None and args.distributed not in (None, ALONE):
        place = _by_cluster(args.distributed)
    if place is None and args.distributed is None:
        _refuse_several_runs()
    size = 1 if place is None else place.num_processes
    if args.expect_processes not in (None, size):
        found = "this process is alone" if place is None else f"the job has {size}"
        raise RequestError(f"--expect-processes={args.expect_processes}: {found}")
    if size == 1 and args.start_timeout is not None:
        raise RequestError(f"--start-timeout={args.start_timeout} has no effect on one process, which waits for none")
    return None if size == 1 else place


def _by_flags(args: argparse.Namespace) -> Optional[Place]:
    flags = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    given = [name for name, value in flags.items() if value is not None]
    if not given:
        return None
    if args.distributed is not None:
        raise RequestError(f"--distributed={args.distributed} has no effect beside {given[0]}")
    missing = [name for name in flags if name not in given]
    if missing:
        raise RequestError(f"{given[0]} needs {' and '.join(missing)}, too")
    if args.process_id >= args.num_processes:
        allowed = f"0 … {args.num_processes - 1} for --num-processes={args.num_processes}"
        raise RequestError(f"--process-id={args.process_id}: allowed are {allowed}")
    return Place(num_processes=args.num_processes, process_id=args.process_id, coordinator=args.coordinator)


def _by_cluster(method: str) -> Place:
    for environment in METHODS[method]:
        try:
            if environment.is_env_present():
                return Place(num_processes=environment.get_process_count(), method=environment.name or None)
        except Exception as error:  # of a client library, a metadata server, a variable that is no number
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise RequestError(f"--distributed={method}: JAX could not ask for its processes: {cause}") from None
    raise RequestError(f"--distributed={method}: JAX finds no such cluster around this process")


def _refuse_several_runs() -> None:
    said = {variable: os.environ.get(variable, "") for variable in (*TASKS, POD)}
    for variable, number in said.items():
        if number.isdecimal() and int(number) > (0 if variable == POD else 1):
            raise RequestError(
                f"{variable}={number}: a launcher started several processes, and each would be a run of its own; say "
                f"--distributed={TASKS.get(variable, 'k8s')} to make them one job, or --distributed={ALONE} if that is "
                "meant"
            )
