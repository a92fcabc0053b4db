"""The script for Cloud TPU, on a `gcloud` that plays a slice which comes and goes."""

import shutil
import subprocess

import pytest

from sparsejax.launch import xla_flags

from launching import CONFIG, printed
from runs import here
from shell import check_script, program, with_programs

PLACE = ["--project=lab", "--zone=us-east5-a", "--volume=10.0.0.2:/export:/mnt/runs", "--workdir=/mnt/runs/tiny"]
SLICE = ["--topology=v5e:4x4", "--mesh=2,8,1", "--config.data.batch_size=16"]


def job(*flags):
    return printed("tpu-vm", *PLACE, *flags)


def worker(text):
    """What hosts run."""
    return text.split("<<'WORKER' || :\n")[1].split("\nWORKER\n")[0]


def test_hosts_run_the_same_command():
    text = job(*SLICE, "--spot", "--directory=/mnt/runs/code", "--setup=pip install -e .", "--env=NOTE=a b")
    check_script(text)
    check_script(f"#!/usr/bin/env bash\n{worker(text)}")
    assert "place=(--project=lab --zone=us-east5-a)\n" in text
    create = "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=tiny --spot ||"
    assert f"        {create}" in text
    flags = " ".join(flag.text for flag in xla_flags.TPU)
    assert worker(text).splitlines()[-6:] == [
        "cd /mnt/runs/code",
        "pip install -e .",
        f"export LIBTPU_INIT_ARGS='{flags}'",
        "export NOTE='a b'",
        'echo "$$" >/dev/shm/tiny.pid',
        f"exec python3 -m sparsejax train {CONFIG} --workdir=/mnt/runs/tiny --mesh=2,8,1 "
        "--config.data.batch_size=16 --expect-processes=4 --stopped-status=75 --distributed=tpu",
    ]
    assert "sudo mount -t nfs 10.0.0.2:/export /mnt/runs" in text


def test_accelerator_types_count_as_the_cloud_does():
    slices = ["--topology=v5p:2x2x2", "--slices=2", "--mesh=2,8,1", "--config.data.batch_size=16"]
    text = job(*slices, "--runtime-version=other")
    assert "--accelerator-type=v5p-16 --runtime-version=other --node-count=2 --node-prefix=tiny ||" in text
    assert "--expect-processes=4" in text and xla_flags.TPU_SLICES[0].text in text
    assert "v6e-8" in job("--topology=v6e:2x4", "--mesh=1,8,1") and "--distributed" not in job("--topology=v6e:1x1")


def run(text, folder, states, statuses, create=0):
    """The script's status and what it asked of gcloud, where the slice is in these states and training ends so."""
    calls = folder / "calls"
    calls.touch()
    program(folder, "sleep", "")
    program(
        folder,
        "gcloud",
        f"""
assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"] and sys.argv[5] == "tiny", sys.argv
verb, path = sys.argv[4], {str(calls)!r}
past = open(path).read().split()
print(verb, file=open(path, "a"))
if verb == "describe":
    state = ({states!r} + ["ACTIVE"] * 9)[past.count("describe")]
    print("a warning", file=sys.stderr)
    exit(state if state.startswith("ERROR") else print(state) if state else "ERROR: NOT_FOUND: no such resource")
if verb == "create":
    exit({create})
if verb == "ssh":
    exit({statuses!r}[past.count("ssh")])
""",
    )
    done = subprocess.run(["bash", "-c", text], env=with_programs(folder), capture_output=True, text=True, timeout=60)
    return done.returncode, [call for call in calls.read_text().split() if call != "describe"]


@pytest.mark.parametrize(
    "states, statuses, status, calls",
    [
        (["", "WAITING_FOR_RESOURCES", "PROVISIONING"], [0], 0, ["create", "ssh", "delete"]),
        (["ACTIVE"], [75, 0], 0, ["ssh", "ssh", "delete"]),
        (["ACTIVE"], [2], 2, ["ssh", "delete"]),
        (["ACTIVE"], [1, 255, 3], 3, ["ssh", "ssh", "ssh", "delete"]),
        # taken away in the middle of it, which is not counted
        (
            ["ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"],
            [255, 1, 1, 0],
            0,
            ["ssh", "delete", "create", "ssh", "ssh", "ssh", "delete"],
        ),
        (["FAILED"], [], 1, ["delete"]),
        # an answer that does not come is asked for again: the slice is neither made twice, nor is this a failure
        (["ERROR: UNAVAILABLE", "ACTIVE", "ERROR: UNAVAILABLE"], [1, 1, 0], 0, ["ssh", "ssh", "ssh", "delete"]),
    ],
)
def test_the_slice_is_asked_for_until_the_run_is_finished(states, statuses, status, calls, tmp_path):
    assert run(job(*SLICE, "--max-restarts=2"), tmp_path, states, statuses) == (status, calls)


def test_a_request_that_the_cloud_refuses_is_made_once(tmp_path):
    assert run(job(*SLICE), tmp_path, ["", ""], [], create=1) == (1, ["create"])


def test_a_request_that_the_cloud_took_without_saying_so_is_not_lost(tmp_path):
    assert run(job(*SLICE), tmp_path, ["", "CREATING"], [0], create=1) == (0, ["create", "ssh", "delete"])


def test_without_gcloud_nothing_is_asked(tmp_path):
    bash = shutil.which("bash") or ""
    done = subprocess.run([bash, "-c", job(*SLICE)], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "failed: there is no gcloud here\n")


def test_words_reach_the_hosts_as_they_are(tmp_path):
    """Through a text in a script that is an argument of a command that a shell reads."""
    hostile = "a'b\"$(touch x)`y`;&|*\\"
    text = job(f"--workdir=/mnt/runs/{hostile}", f"--env=NOTE={hostile}", "--setup=WORKER", "--topology=v5e:1x1")
    program(tmp_path, "gcloud", "print(sys.argv[-1] if sys.argv[4] == 'ssh' else 'ACTIVE')")
    program(tmp_path, "sleep", "")
    done = subprocess.run(["bash", "-c", text], env=with_programs(tmp_path), capture_output=True, text=True, timeout=30)
    command = done.stdout.removeprefix("--command=").splitlines()
    assert "WORKER" in command
    show = "import os, sys; print([sys.argv[5], os.environ['NOTE']])"
    program(tmp_path, "python3", show)
    last = "\n".join([line for line in command if line.startswith(("export", "exec"))])
    shown = subprocess.run(["bash", "-c", last], env=with_programs(tmp_path), capture_output=True, text=True)
    assert shown.stdout == f"{[f'--workdir=/mnt/runs/{hostile}', hostile]}\n"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology=tpu7x:2x2x1"], "tpu7x is to be had through GKE alone (launch jobset)"),
        (["--topology=h100:2x8"], "unknown chip 'h100'; known: v4, v5e, v5p, v6e, tpu7x"),
        (["--topology=v5e:4x4"], "config.mesh: 1×1×1 leaves some of the job's 16 devices idle"),
        (["--topology=v5e:1x1", "--workdir=runs/x"], "is not below /mnt/runs, the shared folder of --volume"),
        (["--topology=v5e:1x1", "--volume=claim:/mnt/runs"], "--volume=claim:/mnt/runs: not HOST:/EXPORT:/PATH"),
        (["--topology=v5e:1x1", "--name=a_b"], "--name=a_b: allowed are"),
        (["--topology=v5e:1x1", "--zone=a b"], "--zone=a b: allowed are"),
        (["--topology=v5e:1x1", "--setup=a\nb"], "only printable characters"),
    ],
)
def test_what_would_not_start_is_refused(flags, said):
    assert said in here("launch", "tpu-vm", CONFIG, *PLACE, *flags).error
