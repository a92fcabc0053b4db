"""Real processes that are one job, without a model: what they say to each other, and how the end of one ends all."""

import os
import socket
import subprocess
import sys
import time

import pytest

from runs import ROOT

BEGIN = """
import os, signal, sys, time
from sparsejax.base import job
from sparsejax.base.cluster import Place
from sparsejax.base.errors import RequestError, RunError
from sparsejax.base.processes import barrier, check_same, from_first, process_id
from sparsejax.train.signals import StopOnSignal
job.HEARTBEAT = 5
count, me, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
"""
PLACE = "with job.job(Place(num_processes=count, process_id=me, coordinator=address), patience={patience}):\n"


def run(body, count=2, come=None, patience=60, killed=None, place=PLACE, variables=lambda number: {}):
    """(status, output, errors) of each process of a job whose processes do `body`; only the first `come` are
    started. The process `killed` is, once it has printed a line. Each has `variables(number)` in its environment."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    script = BEGIN + place.format(patience=patience) + indented
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [[sys.executable, "-c", script, str(count), str(number), address] for number in range(come or count)]
    children = [subprocess.Popen(each, env=env | variables(number), **pipes) for number, each in enumerate(words)]
    try:
        if killed is not None:
            assert children[killed].stdout.readline() == "here\n"
            children[killed].kill()
        told = [child.communicate(timeout=90) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *texts) for child, texts in zip(children, told, strict=True)]


def test_what_the_first_says_all_hear():
    first, second = run(
        """
print(from_first("a number", lambda: 40 + process_id()), from_first("nothing", lambda: None))
barrier("all have heard")
check_same("number", "2" if me else "1")
"""
    )
    assert first == (2, "40 None\n", "error: process 1: process 1 has another number than process 0\n")
    status, out, err = second  # the runtime may have words after that, where the first has ended before
    assert (status, out) == (2, "40 None\n") and err.startswith("error: process 1 has another number than process 0\n")


def test_a_barrier_names_those_who_do_not_come():
    *late, missing = run(
        """
if me < 2:
    barrier("soup", 1)
time.sleep(60)
""",
        count=3,
    )
    told = "barrier 'soup': process 2 did not come within 1 s"
    for status, _, err in late:
        assert status == 1 and f"failed: {told}\nTraceback" in err, err
    status, _, err = missing
    lines = {f"failed: process {number}: {told}" for number in (0, 1)}
    assert status == 1 and lines & set(err.splitlines()), err  # the runtime may have words after that


def test_an_exception_ends_all_with_its_cause():
    begun = time.monotonic()
    first, second = run("barrier('start')\nif me: raise RunError('the disk is full')\ntime.sleep(60)")
    assert time.monotonic() - begun < 45
    assert second[0] == 1 and second[2].startswith("failed: the disk is full\nTraceback"), second
    assert first == (1, "", "failed: process 1: the disk is full\n")


@pytest.mark.parametrize("killed", [0, 1])
def test_the_survivor_says_who_is_gone(killed):
    done = run("barrier('start')\nprint('here')\ntime.sleep(60)", killed=killed)
    told = "process 1 is gone (no heartbeat for 5 s)" if killed else "process 0, the coordinator, is gone"
    status, _, err = done[1 - killed]
    assert status == 1 and f"failed: {told}" in err.splitlines(), err


def test_a_job_that_is_not_complete_does_not_begin():
    first, second = run("print('begun')", count=4, come=2, patience=3)
    for status, out, err in (first, second):
        assert (status, out) == (1, ""), err
        assert err.splitlines()[-1].startswith("failed: not all 4 processes came within 3 s")
    assert "task names:\n3\n2\n" in first[2] or "task names:\n2\n3\n" in first[2]


def test_processes_stop_at_the_same_look_whoever_is_asked():
    """Both are, at different looks, and one looks ahead of the other."""
    body = """
with StopOnSignal() as stop:
    for step in range(1, 100):
        barrier(f"step {step}")
        if step == 5 + 2 * me:
            os.kill(os.getpid(), signal.SIGINT if me else signal.SIGTERM)
        time.sleep(0.01 * me)
        if stop.look():
            break
    print(step, stop.name)
"""
    (_, one, err), (_, two, _) = run(body)
    assert one == two, err
    assert one in ("8 SIGTERM\n",)


def slurm(number):
    """What srun leaves in the environment of a task, on this machine."""
    task = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    return {**job, **task, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}


def open_mpi(number):
    """What mpirun does, before version 5."""
    rank = {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(number)}
    uri = f"{2**12 * os.getpid()}.0;tcp://127.0.0.1:1234"
    return {**rank, "OMPI_MCA_orte_hnp_uri": uri, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_VERSION": "4.1.6"}


@pytest.mark.parametrize(
    ("method", "variables"), [("slurm", slurm), pytest.param("ompi", open_mpi, marks=pytest.mark.slow)]
)
def test_jax_finds_the_others_by_what_a_launcher_says(method, variables):
    place = f"""
from sparsejax import cli
from sparsejax.base.cluster import find_place
flags = ["--distributed={method}", "--expect-processes=2"]
with job.job(find_place(cli._verb_parser("train").parse_args(flags)), patience={{patience}}):
"""
    body = "barrier('all')\nprint(process_id(), from_first('who', process_id))"
    assert run(body, place=place, variables=variables) == [(0, "0 0\n", ""), (0, "1 0\n", "")]


def test_each_process_reads_the_rows_that_its_devices_hold():
    """Half of them where the mesh splits rows between the processes, in every microbatch; all where it does not."""
    body = """
from sparsejax.base.devices import prepare_devices
from sparsejax.base.sharding import MeshConfig, host_rows, make_mesh
prepare_devices(2)
for data, expert, tensor in ((2, 2, 1), (2, 1, 2), (1, 1, 4)):
    mesh = make_mesh(MeshConfig(data=data, expert=expert, tensor=tensor))
    print(*host_rows(mesh, 8, 2).tolist())
"""
    (_, first, _), (_, second, err) = run(body)
    assert first.splitlines()[-3:] == ["0 1 4 5", "0 1 4 5", "0 1 2 3 4 5 6 7"], err
    assert second.splitlines()[-3:] == ["2 3 6 7", "2 3 6 7", "0 1 2 3 4 5 6 7"], err
