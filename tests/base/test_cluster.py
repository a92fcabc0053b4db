"""Which job a process belongs to, by flags or as its launcher says; jobs that nobody means are refused."""

import pytest
from jax._src.clusters import K8sCluster

from sparsejax import cli
from sparsejax.base.cluster import ALONE, METHODS, Place, find_place
from sparsejax.base.errors import RequestError

from runs import CONFIG

FLAGS = ("--coordinator=host:1234", "--num-processes=4", "--process-id=1")
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1234",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_VERSION": "4.1.6",
}
POD = {"JOB_COMPLETION_INDEX": "1"}
LAUNCHERS = {"slurm": SLURM, "ompi": OPEN_MPI, "k8s": POD}


def place(*flags):
    return find_place(cli._verb_parser("train").parse_args(flags))


def refusal(*flags) -> str:
    with pytest.raises(RequestError) as caught:
        place(*flags)
    return str(caught.value)


@pytest.fixture
def launched_by(monkeypatch):
    def by(name, **more):
        for variable, value in (LAUNCHERS[name] | more).items():
            monkeypatch.setenv(variable, value)

    return by


def test_without_flags_a_process_is_alone():
    assert place() is None
    assert place("--expect-processes=1") is None
    assert place("--coordinator=host:1", "--num-processes=1", "--process-id=0") is None


def test_one_process_waits_for_none():
    said = "--start-timeout=9 has no effect on one process"
    assert said in refusal("--start-timeout=9")
    assert said in refusal("--start-timeout=9", "--coordinator=host:1", "--num-processes=1", "--process-id=0")
    assert place("--start-timeout=9", *FLAGS) == place(*FLAGS)


def test_flags_say_the_place():
    assert place(*FLAGS, "--expect-processes=4") == Place(num_processes=4, process_id=1, coordinator="host:1234")


@pytest.mark.parametrize("method", ["slurm", "ompi", "auto"])
def test_the_cluster_says_the_place(launched_by, method):
    name = "slurm" if method == "auto" else method
    launched_by(name)
    assert place(f"--distributed={method}", "--expect-processes=4") == Place(num_processes=4, method=name)


def test_a_single_task_is_alone(launched_by):
    launched_by("slurm", SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1")
    assert place() is None
    assert place("--distributed=slurm") is None


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_tasks_that_are_not_told_to_be_one_job_are_refused(launched_by, launcher):
    launched_by(launcher)
    told = refusal()
    assert "each would be a run of its own" in told and f"--distributed={launcher}" in told
    assert place("--distributed=none") is None
    assert place(*FLAGS) is not None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (FLAGS[:1], "--coordinator needs --num-processes and --process-id, too"),
        (FLAGS[1:], "--num-processes needs --coordinator, too"),
        ((*FLAGS[:2], "--process-id=4"), "--process-id=4: allowed are 0 … 3 for --num-processes=4"),
        ((*FLAGS, "--distributed=slurm"), "--distributed=slurm has no effect beside --coordinator"),
        ((*FLAGS, "--expect-processes=8"), "--expect-processes=8: the job has 4"),
        (("--expect-processes=2",), "--expect-processes=2: this process is alone"),
        (("--distributed=slurm",), "--distributed=slurm: JAX finds no such cluster around this process"),
        (("--distributed=auto",), "--distributed=auto: JAX finds no such cluster around this process"),
        (("--coordinator=host", *FLAGS[1:]), "'host' is not HOST:PORT"),
        (("--distributed=slrum",), "invalid choice: 'slrum'"),
    ],
)
def test_contradictions_are_refused(flags, told):
    assert told in refusal(*flags)


def test_what_jax_cannot_ask_is_told(launched_by):
    launched_by("slurm", SLURM_NTASKS="four")
    assert refusal("--distributed=slurm").startswith(
        "--distributed=slurm: JAX could not ask for its processes: invalid"
    )


def test_the_flag_offers_what_there_is():
    assert (*METHODS, ALONE) == cli._CLUSTERS


def test_kubernetes_is_asked_for_the_size(monkeypatch):
    """JAX's class for it needs a server; it is found by being present, for it has no name."""
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(K8sCluster, "get_process_count", lambda: 4)
    assert place("--distributed=k8s") == Place(num_processes=4, method=None)


@pytest.mark.parametrize("words", [("generate",), ("eval", "--parity", "--mesh=1,1,1")])
def test_what_runs_in_one_process_says_so(words, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    status = cli.main([*words, f"--workdir={tmp_path}", CONFIG, *FLAGS])
    what = " ".join(words[:2])
    assert (status, capsys.readouterr().err) == (2, f"error: {what} runs in one process, and this job has 4\n")
