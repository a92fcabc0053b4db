"""A JobSet of Kubernetes (jobset.x-k8s.io): one Job for each slice, one pod for each host, started again together.

The pod template is built of the official client's models; the JobSet around it is a mapping, for the client has no
model of it. On TPUs, JAX knows its processes from what GKE tells the pods. On GPUs it asks Kubernetes, so pods need
`kubernetes` in their image and a service account that may read pods and jobs."""

import argparse
import importlib
from typing import Any

from sparsejax.base.errors import RequestError
from sparsejax.launch.job import KILLED, STOPPED, WRONG, Rendered, Request, check_value, default_name, shared_folder
from sparsejax.launch.topology import GPUS, Slice, parse_slice
from sparsejax.launch.xla_flags import environment

JOB = "workers"  # the name of the replicated job
LABEL, ALLOWED = r"[a-z]([a-z0-9-]*[a-z0-9])?", "a letter, then letters, digits and -, in lower case"
SPOT = "cloud.google.com/gke-spot"


def render(request: Request, args: argparse.Namespace) -> Rendered:
    """The manifest for `kubectl apply`.

    Raises:
      RequestError: also where the client is not installed.
    """
    piece = parse_slice(args.topology, gpus=True)
    on_gpus = piece.tpu is None
    if on_gpus and args.slices > 1:
        raise RequestError(
            f"--slices={args.slices} has no effect on GPUs: --topology={args.topology} says how many hosts"
        )
    # Kubernetes allows a pod 63 characters: NAME-workers-SLICE-HOST-xxxxx.
    rest = len(f"-{JOB}-{args.slices - 1}-{piece.hosts - 1}-xxxxx")
    name = check_value("--name", args.name or default_name(request.stem), LABEL, ALLOWED, 63 - rest)
    check_value("--namespace", args.namespace, LABEL, ALLOWED)
    check_value("--service-account", args.service_account or name, LABEL, ALLOWED)
    processes = piece.hosts * args.slices
    platform = "gpu" if on_gpus else "tpu"
    train = [*request.train(processes, piece.devices, platform, args.slices), f"--stopped-status={STOPPED}"]
    train += [f"--distributed={'k8s' if on_gpus else 'tpu'}"] if processes > 1 else []
    volume = shared_folder(request.workdir, args.volume, "CLAIM:/PATH")
    check_value("--volume", volume[0], LABEL, ALLOWED)
    models, yaml = _client()
    several = processes > 1 if on_gpus else args.slices > 1
    variables = environment(platform, several) | dict(args.env)
    account = args.service_account or (name if on_gpus and processes > 1 else None)
    pod = _pod(models, piece, args, [args.python, *train], variables, volume)
    pod.spec.service_account_name = account
    to_plain = models.ApiClient().sanitize_for_serialization
    jobset = _jobset(name, args, to_plain(_job(models, piece.hosts, pod)))
    rights = [] if account is None or args.service_account else to_plain(_rights(models, account, args.namespace))
    body = yaml.safe_dump_all([*rights, jobset], sort_keys=False, width=1000)
    return Rendered(text=f"{request.comment}\n{body}", program=("kubectl", "apply", "--filename=-"), from_stdin=True)


def _client() -> tuple[Any, Any]:
    try:
        return importlib.import_module("kubernetes.client"), importlib.import_module("yaml")
    except ImportError:
        raise RequestError("the Kubernetes client is not installed: pip install -e '.[launch]'") from None


def _pod(
    models: Any,
    piece: Slice,
    args: argparse.Namespace,
    command: list[str],
    variables: dict[str, str],
    volume: tuple[str, Any],
) -> Any:
    """The template of a host's pod."""
    claim, path = volume
    resource = "nvidia.com/gpu" if piece.tpu is None else "google.com/tpu"
    volumes = [
        models.V1Volume(
            name="run", persistent_volume_claim=models.V1PersistentVolumeClaimVolumeSource(claim_name=claim)
        )
    ]
    mounts = [models.V1VolumeMount(name="run", mount_path=str(path))]
    if piece.tpu is None:  # NCCL's processes and threads talk through shared memory, of which pods have 64 MiB
        volumes.append(models.V1Volume(name="shm", empty_dir=models.V1EmptyDirVolumeSource(medium="Memory")))
        mounts.append(models.V1VolumeMount(name="shm", mount_path="/dev/shm"))
    container = models.V1Container(
        name="train",
        image=args.image,
        # Kubernetes replaces $(NAME), and takes $$( for a plain $(.
        command=[word.replace("$(", "$$(") for word in command],
        env=[models.V1EnvVar(name=key, value=value.replace("$(", "$$(")) for key, value in variables.items()],
        working_dir=str(args.directory) if args.directory else None,
        # Where a host's libtpu is reached by those of the others.
        ports=[models.V1ContainerPort(container_port=port) for port in (8471, 8080)] if piece.tpu else None,
        resources=models.V1ResourceRequirements(limits={resource: str(piece.chips)}),
        volume_mounts=mounts,
    )
    spot = models.V1Toleration(key=SPOT, operator="Equal", value="true", effect="NoSchedule")
    spec = models.V1PodSpec(
        containers=[container],
        node_selector=_selector(piece) | ({SPOT: "true"} if args.spot else {}),
        tolerations=[spot] if args.spot else None,
        volumes=volumes,
        restart_policy="Never",  # the whole set starts again, or the others would wait for the one
        termination_grace_period_seconds=args.grace,
    )
    return models.V1PodTemplateSpec(spec=spec)


def _selector(piece: Slice) -> dict[str, str]:
    if piece.tpu is None:
        return {"cloud.google.com/gke-accelerator": GPUS[piece.name]}
    return {
        "cloud.google.com/gke-tpu-accelerator": piece.tpu.gke,
        "cloud.google.com/gke-tpu-topology": piece.shape,
    }


def _job(models: Any, hosts: int, pod: Any) -> Any:
    """The job of one slice. It fails as a whole; its reason, and message, tell the JobSet what to make of it."""
    stopped = models.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=[STOPPED, KILLED])
    taken = models.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    wrong = models.V1PodFailurePolicyOnExitCodesRequirement(operator="In", values=[WRONG])
    rules = [
        models.V1PodFailurePolicyRule(action="FailJob", on_exit_codes=stopped),
        models.V1PodFailurePolicyRule(action="FailJob", on_pod_conditions=[taken]),
        models.V1PodFailurePolicyRule(action="FailJob", on_exit_codes=wrong),
    ]
    spec = models.V1JobSpec(
        parallelism=hosts,
        completions=hosts,
        completion_mode="Indexed",
        backoff_limit=0,
        pod_failure_policy=models.V1PodFailurePolicy(rules=rules),
        template=pod,
    )
    return models.V1JobTemplateSpec(spec=spec)


def _jobset(name: str, args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    # A slice has a node pool of its own, which no other job of the set may use.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    # All rules of the job give the same reason; its message ends in "… with exit code 2 matching FailJob rule at …".
    wrong = {
        "name": "wrong",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f"exit code {WRONG} "],
    }
    preempted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": args.namespace,
            **({"annotations": exclusive} if args.slices > 1 else {}),
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": args.max_restarts, "rules": [wrong, preempted]},
            "replicatedJobs": [{"name": JOB, "replicas": args.slices, "template": job}],
        },
    }


def _rights(models: Any, account: str, namespace: str) -> list[Any]:
    """A service account, and what JAX asks with it: which pod am I, of which job, and by what name is the first."""
    meta = models.V1ObjectMeta(name=account, namespace=namespace)
    read = [("", ["pods", "services"]), ("batch", ["jobs"])]
    rules = [models.V1PolicyRule(api_groups=[group], resources=what, verbs=["get", "list"]) for group, what in read]
    role = models.V1RoleRef(api_group="rbac.authorization.k8s.io", kind="Role", name=account)
    subject = models.RbacV1Subject(kind="ServiceAccount", name=account, namespace=namespace)
    return [
        models.V1ServiceAccount(api_version="v1", kind="ServiceAccount", metadata=meta),
        models.V1Role(api_version="rbac.authorization.k8s.io/v1", kind="Role", metadata=meta, rules=rules),
        models.V1RoleBinding(
            api_version="rbac.authorization.k8s.io/v1",
            kind="RoleBinding",
            metadata=meta,
            role_ref=role,
            subjects=[subject],
        ),
    ]
