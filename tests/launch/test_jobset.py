"""The manifest for Kubernetes: what a scheduler and JAX need to be in it, and the schema of JobSet itself."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from sparsejax.launch import xla_flags

from launching import CONFIG, printed
from runs import here

CRD = os.environ.get("SPARSEJAX_JOBSET_CRD")
PLACE = ["--image=registry/sparsejax:1", "--volume=runs:/runs", "--workdir=/runs/tiny"]
FLAGS = {
    "one host": ["--topology=v5e:2x2", "--mesh=4,1,1"],
    "a slice": ["--topology=v5p:2x2x4", "--mesh=2,8,1", "--config.data.batch_size=16", "--directory=/app", "--spot"],
    "slices": ["--topology=v6e:4x4", "--slices=2", "--mesh=4,8,1", "--config.data.batch_size=32", "--max-restarts=9"],
    "gpus": ["--topology=h100:2x4", "--mesh=1,8,1", "--namespace=research", "--name=big"],
}

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("kubernetes") is None, reason="the Kubernetes client is not installed (extra `launch`)"
)


def manifest(*flags):
    """The JobSet, and what comes before it."""
    *others, jobset = yaml.safe_load_all(printed("jobset", *PLACE, *flags))
    return jobset, others


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]


@needs_client
def test_a_slice_is_a_job_with_a_pod_for_each_host():
    jobset, others = manifest(*FLAGS["a slice"])
    assert others == [] and jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert jobset["metadata"] == {"name": "tiny", "namespace": "default"}
    job, pod = job_of(jobset), pod_of(jobset)
    assert (job["parallelism"], job["completions"], job["backoffLimit"], job["completionMode"]) == (4, 4, 0, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot" and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"} and container["workingDir"] == "/app"
    train = ["python3", "-m", "sparsejax", "train", CONFIG, "--workdir=/runs/tiny", "--mesh=2,8,1"]
    rest = ["--config.data.batch_size=16", "--expect-processes=4", "--stopped-status=75", "--distributed=tpu"]
    assert container["command"] == train + rest
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": " ".join(f.text for f in xla_flags.TPU)}]
    assert container["volumeMounts"] == [{"name": "run", "mountPath": "/runs"}]
    assert pod["volumes"] == [{"name": "run", "persistentVolumeClaim": {"claimName": "runs"}}]


@needs_client
def test_slices_are_jobs_on_node_pools_of_their_own():
    jobset, _ = manifest(*FLAGS["slices"])
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2 and job_of(jobset)["parallelism"] == 4
    assert list(jobset["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]
    container = pod_of(jobset)["containers"][0]
    assert "--expect-processes=8" in container["command"]
    assert container["env"][0]["value"].endswith(xla_flags.TPU_SLICES[-1].text)


@needs_client
def test_gpus_are_counted_by_host_and_pods_may_ask_who_they_are():
    jobset, others = manifest(*FLAGS["gpus"])
    account, role, binding = others
    assert [each["kind"] for each in others] == ["ServiceAccount", "Role", "RoleBinding"]
    assert {each["metadata"]["name"] for each in others} == {"big"} == {pod_of(jobset)["serviceAccountName"]}
    assert {each["metadata"]["namespace"] for each in [*others, jobset]} == {"research"}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == account["metadata"]["name"]
    pod = pod_of(jobset)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert "--distributed=k8s" in pod["containers"][0]["command"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    jobset, others = manifest(*FLAGS["gpus"], "--service-account=reader")
    assert others == [] and pod_of(jobset)["serviceAccountName"] == "reader"


@needs_client
def test_one_host_needs_no_rights_and_no_other_processes():
    jobset, others = manifest("--topology=a100:1x8", "--mesh=1,8,1")
    assert others == [] and "serviceAccountName" not in pod_of(jobset)
    command = pod_of(jobset)["containers"][0]["command"]
    assert not [word for word in command if word.startswith(("--distributed", "--expect"))]
    jobset, _ = manifest(*FLAGS["one host"])
    assert pod_of(jobset)["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


@needs_client
def test_preemptions_are_not_counted_as_failures():
    jobset, _ = manifest(*FLAGS["slices"])
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 9
    last = policy["rules"][-1]
    assert last["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert last["onJobFailureReasons"] == ["PodFailurePolicy"]
    stopped, taken, _ = job_of(jobset)["podFailurePolicy"]["rules"]
    assert stopped == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [75, 143]}}
    assert taken["action"] == "FailJob" and taken["onPodConditions"][0]["type"] == "DisruptionTarget"


@needs_client
def test_a_wrong_request_is_made_once():
    """Status 2, and neither a preemption nor 20 or 12, by what Kubernetes says of the job."""
    jobset, _ = manifest(*FLAGS["slices"])
    wrong = job_of(jobset)["podFailurePolicy"]["rules"][-1]
    assert wrong == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    first = jobset["spec"]["failurePolicy"]["rules"][0]
    assert (first["action"], first["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (pattern,) = first["onJobFailureMessagePatterns"]
    message = (
        "Container train for pod default/tiny-workers-0-2 failed with exit code {} matching FailJob rule at index 2"
    )
    assert [code for code in (2, 12, 20, 75, 143) if re.search(pattern, message.format(code))] == [2]


@needs_client
def test_words_reach_the_pod_as_they_are():
    hostile = """a: b'c"{x} # $HOME `y` - |"""
    jobset, _ = manifest(*FLAGS["gpus"], f"--env=NOTE={hostile}$(HOME)", f"--workdir=/runs/{hostile}$(HOME)")
    container = pod_of(jobset)["containers"][0]
    assert container["env"][-1] == {"name": "NOTE", "value": f"{hostile}$$(HOME)"}  # for Kubernetes, $( itself
    assert f"--workdir=/runs/{hostile}$$(HOME)" in container["command"]


@needs_client
@pytest.mark.skipif(
    CRD is None, reason="SPARSEJAX_JOBSET_CRD does not name the file of JobSet's CustomResourceDefinition"
)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=list(FLAGS))
def test_the_manifest_keeps_to_the_schema_of_jobset(flags):
    jsonschema = pytest.importorskip("jsonschema")
    versions = yaml.safe_load(Path(CRD).read_text())["spec"]["versions"]
    jobset, _ = manifest(*flags)
    schema = next(each for each in versions if jobset["apiVersion"].endswith(each["name"]))["schema"]["openAPIV3Schema"]
    validator = jsonschema.Draft202012Validator(closed(schema))
    assert not list(validator.iter_errors(jobset))
    pod_of(jobset)["containers"][0]["imagee"] = "x"  # it does look that deep
    assert [list(error.path)[-1] for error in validator.iter_errors(jobset)] == [0]


def closed(schema):
    """The schema, with no fields but those that it knows, as the server prunes them."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: closed(value) for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict) and "type" in schema
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    return inside | ({"additionalProperties": False} if known and not free else {})


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology=v5e:4x5"], "--topology=v5e:4x5: no such slice; those of v5e: 1x1, 2x2"),
        (["--topology=v5p:8x4x4"], "with A ≤ B ≤ C multiples of 4, up to 6144 chips"),
        (["--topology=v5x:4x4"], "unknown chip 'v5x'; known: v4, v5e"),
        (["--topology=h100:16"], "not h100:HOSTSxGPUS"),
        (["--topology=h100:2x4", "--slices=2"], "--slices=2 has no effect on GPUs"),
        (["--topology=v5e:4x4"], "config.mesh: 1×1×1 leaves some of the job's 16 devices idle"),
        (["--topology=v5e:4x4", "--mesh=1,16,1", "--config.data.batch_size=16"], "num_experts: 8 is not divisible"),
        (["--topology=tpu7x:2x2x1", "--mesh=4,1,1"], "leaves some of the job's 8 devices idle"),
        (["--topology=v5e:1x1", "--name=Big"], "--name=Big: allowed are a letter, then letters"),
        (["--topology=v5e:1x1", f"--name={'a' * 46}"], "at most 45 characters"),
        (["--topology=v5e:1x1", "--workdir=runs/x"], "--workdir=runs/x is not below /runs"),
        (["--topology=v5e:1x1", "--workdir=/runs/../x"], "is not below /runs"),
        (["--topology=v5e:2x2", "--slices=2", "--mesh=1,8,1"], "mesh.data: 1 is not a multiple of the 2 slices"),
        (["--topology=v5e:1x1", "--namespace=a_b"], "--namespace=a_b: allowed are"),
        (["--topology=v5e:1x1", "--service-account=a b"], "--service-account=a b: allowed are"),
        (["--topology=v5e:1x1", "--volume=A:/runs"], "--volume=A: allowed are"),
        (["--topology=v5e:1x1", "--volume=x"], "'x' does not end in :/PATH"),
        (["--topology=v5e:1x1", "--nodes=2"], "unknown flag '--nodes=2' for launch jobset"),
        ([], "arguments are required: --topology"),
    ],
)
def test_what_would_not_start_is_refused(flags, said):
    assert said in here("launch", "jobset", CONFIG, *PLACE, *flags).error


def test_a_folder_that_hosts_do_not_share_is_refused():
    flags = ["--image=x", "--topology=v5e:1x1", "--workdir=/runs/tiny"]
    assert "--volume=CLAIM:/PATH is needed" in here("launch", "jobset", CONFIG, *flags).error


def test_the_client_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes.client", None)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    refused = here("launch", "jobset", CONFIG, *PLACE, "--topology=v5e:1x1").error
    assert "the Kubernetes client is not installed: pip install -e '.[launch]'" in refused
