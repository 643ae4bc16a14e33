"""What a recipe can't know of a cluster: image, machines, limits, and each target's own names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from piflow.config import RecipeError, plain_yaml
from piflow.jobs.machines import (
    AwsValues,
    GcpValues,
    OnPremiseValues,
    SkyValues,
    SlurmValues,
)
from piflow.jobs.strict import NonNegative, Positive, PositiveFloat, Strict
from piflow.runtime.spot import NOTICE_SECONDS
from piflow.storage.foreign import shown

_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY)", re.IGNORECASE)
_PINNED = re.compile(r"^[^\s@]+@sha256:[0-9a-f]{64}$")
_CIDR = r"^(\d{1,3}\.){3}\d{1,3}/\d{1,2}$"
_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"

Labels = dict[str, str]
Label = Annotated[str, Field(pattern=_LABEL, max_length=63)]


class ValuesError(ValueError):
    """Values that can't be used; the message names the key, what came and what is allowed."""


class Machine(Strict):
    """What piflow may use of one machine, or of one pod: less than the machine has."""

    cpus: Positive
    """Logical CPUs."""

    memory_gib: Positive
    """Memory, GiB; of which two fifths may be /dev/shm, Ray's object store among it."""


class CpuMachines(Machine):
    """Machines without GPUs: prompts, pictures and rows are prepared there."""

    most: Positive
    """The most of them at once; they come when there is work."""


class GpuMachines(Machine):
    """Machines with GPUs. A stage that needs fewer GPUs asks for that share of one."""

    gpus: Positive
    """GPUs of a machine."""


class Limits(Strict):
    """When a job is given up, and what is kept of it."""

    hours: PositiveFloat
    """The longest that a job may take with all its retries. A head that restarts can leave a job
    that nobody ends; this does.
    """

    start_minutes: PositiveFloat
    """The longest that it may wait for machines before its first process runs."""

    idle_minutes: PositiveFloat = 5.0
    """After which a machine without work is given back."""

    retries: NonNegative = 2
    """New clusters after a failure; each goes on from storage."""

    keep_minutes: NonNegative = 10
    """How long a finished job's cluster stays for whoever wants to look."""


class SharedFolder(Strict):
    """A volume that all pods write, such as NFS, EFS or Filestore."""

    claim: Label
    """Name of the PersistentVolumeClaim (ReadWriteMany)."""

    path: Annotated[str, Field(pattern=r"^/[\w./-]+$")] = "/mnt/piflow"
    """Where it is mounted; a recipe's relative paths begin there."""


class Redis(Strict):
    """Where a head that restarts finds its cluster again (GCS fault tolerance)."""

    address: Annotated[str, Field(pattern=r"^[\w.-]+:\d+$")]
    """host:port."""

    secret: Label
    """Name of the Secret with the password."""

    key: str = "password"
    """Its key in the Secret."""


class Egress(Strict):
    """Addresses beside DNS, HTTPS and the job's own pods that pods may reach."""

    cidr: Annotated[str, Field(pattern=_CIDR)]
    """Such as 10.0.0.0/16."""

    port: Annotated[int, Field(ge=1, le=65535)]
    """TCP."""


class Toleration(Strict):
    """Of a node's taint."""

    key: str
    value: str | None = None
    """Default: any."""

    effect: Annotated[str, Field(pattern="^(NoSchedule|NoExecute|PreferNoSchedule)$")] = (
        "NoSchedule"
    )


class Efa(Strict):
    """AWS's Elastic Fabric Adapter between GPU machines."""

    interfaces: Positive
    """Of a machine: 32 of p5.48xlarge, 4 of p4d.24xlarge."""

    hugepages_gib: Positive = 5
    """2 MiB pages of a pod; the machines must have set them aside."""


class GkeRdma(Strict):
    """GPUDirect RDMA between GKE's A3 Ultra and A4 machines."""

    interfaces: Positive = 8
    """RDMA interfaces of a machine, with the networks rdma-0, rdma-1, …"""


class Spot(Strict):
    """GPU machines that a cloud may take away."""

    node_selector: Labels
    """Labels of such nodes."""

    tolerations: list[Toleration] = []
    """Of their taints."""

    notice_seconds: Positive
    """Between the cloud's notice and the machine's end: AWS 120, Google 25."""


class Kueue(Strict):
    """Kueue's queues. Their quota is the most of all jobs of a team at once."""

    queue: Label
    """The team's LocalQueue, in the namespace."""

    cluster_queue: Label
    """What it draws from."""

    priority: Label = "piflow-training"
    """WorkloadPriorityClass of jobs."""

    topology_level: str = "cloud.provider.com/topology-block"
    """Node label within one value of which a job's GPU machines must lie."""

    gpus: Positive
    """Quota."""

    cpus: Positive
    """Quota."""

    memory_gib: Positive
    """Quota."""


class KubernetesValues(Strict):
    """Target kuberay: KubeRay's operator 1.7 or newer."""

    namespace: Label
    """Where jobs live; it must be there."""

    operator_namespace: Label = "kuberay-system"
    """Of KubeRay's operator, which asks heads for their jobs' state."""

    monitoring_namespace: Label = "monitoring"
    """Of Prometheus, which may read metrics."""

    priority: int = Field(1000, ge=-(10**9), le=10**9)
    """Of the PriorityClass."""

    secret: Label | None = None
    """Secret whose keys become environment variables: HF_TOKEN, MLFLOW_TRACKING_PASSWORD, …"""

    image_pull_secret: Label | None = None
    """Of the image's registry."""

    service_account_annotations: Labels = {}
    """What gives pods their cloud rights, e.g. eks.amazonaws.com/role-arn."""

    gpu_node_selector: Labels
    """Labels of GPU nodes, e.g. node.kubernetes.io/instance-type."""

    gpu_tolerations: list[Toleration] = [Toleration(key="nvidia.com/gpu")]
    """Of GPU nodes' taints."""

    cpu_node_selector: Labels = {}
    """Labels of nodes for heads and CPU pods."""

    shared_folder: SharedFolder | None = None
    """Without one all of a recipe's places are s3://, hf:// or package://."""

    redis: Redis | None = None
    """Of the development cluster. A job needs none: a new cluster goes on from storage."""

    egress: list[Egress] = []
    """E.g. of an MLflow server without HTTPS."""

    efa: Efa | None = None
    """Given: the overlay aws-efa is written."""

    gke_rdma: GkeRdma | None = None
    """Given: the overlay gke-rdma is written."""

    spot: Spot | None = None
    """Given: the overlay spot is written."""

    kueue: Kueue | None = None
    """Given: queues and the overlay kueue are written; and elastic, if the recipe's number of
    workers is a range.
    """


class Values(Strict):
    """One values file."""

    image: str
    """Of head and workers, pinned: registry/name@sha256:… with piflow, Ray and CUDA's libraries."""

    ray_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    """Ray's version in the image."""

    run_name: Label | None = None
    """Names of jobs begin with it; default: the recipe's name, with - for . and _."""

    saving_seconds: Positive
    """Seconds that a training step and the save after it take at most, and ten more until all
    workers have heard of it: how long a job that is stopped, or a machine that goes, gets for it.
    MLflow's step_seconds and checkpoint_write_seconds of an earlier run tell it.
    """

    environment: Labels = {}
    """Variables of all processes. Nothing secret: they are shown by dashboard and jobs API."""

    head: Machine
    """Of Ray's head and the driver, without a GPU."""

    cpu_machines: CpuMachines
    gpu_machines: GpuMachines | None = None
    """None: recipes with runtime.use_gpu are refused."""

    limits: Limits
    kubernetes: KubernetesValues | None = None
    aws: AwsValues | None = None
    gcp: GcpValues | None = None
    on_premise: OnPremiseValues | None = None
    slurm: SlurmValues | None = None
    sky: SkyValues | None = None

    @field_validator("image")
    @classmethod
    def _is_pinned(cls, image: str) -> str:
        if not _PINNED.match(image):
            raise ValueError(
                "expected registry/name@sha256:<64 hex digits>: a tag may name another image "
                "tomorrow, and a run's workers must all have the same; `docker buildx imagetools "
                "inspect IMAGE` prints the digest"
            )
        return image

    @field_validator("environment")
    @classmethod
    def _holds_no_secret(cls, environment: Labels) -> Labels:
        for name in environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ValueError(f"{shown(repr(name))} is no name of an environment variable")
            if _SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret, which dashboard and jobs API would show; put it "
                    "into the Secret that kubernetes.secret names, or give machines a role"
                )
        return environment

    @model_validator(mode="after")
    def _saves_within_the_notice(self) -> Values:
        spot = None if self.kubernetes is None else self.kubernetes.spot
        notices: dict[str, int] = {}
        if spot is not None:
            notices["kubernetes.spot.notice_seconds"] = spot.notice_seconds
        if self.aws is not None and self.aws.gpu_market == "spot":
            notices["aws.gpu_market = spot"] = NOTICE_SECONDS["aws"]
        if self.gcp is not None and self.gcp.gpu_market == "spot":
            notices["gcp.gpu_market = spot"] = NOTICE_SECONDS["gcp"]
        for key, seconds in notices.items():
            if self.saving_seconds >= seconds:
                raise ValueError(
                    f"{key} ({seconds} s) is how long a machine lives after its notice, and "
                    f"saving_seconds is {self.saving_seconds}; leave spot out, or make steps and "
                    "saves shorter (more workers, a smaller batch)"
                )
        return self


def load_values(path: str | Path) -> Values:
    """Read and check a values file.

    Raises:
        ValuesError: it is missing or no YAML mapping, or a key or value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValuesError(f"values file not found: {path}; cluster/values.yaml is an example")
    try:
        with path.open("rb") as file:
            content = file.read(plain_yaml.MAX_BYTES + 1)
        tree = plain_yaml.load_mapping(content, where=str(path))
    except RecipeError as error:
        raise ValuesError(str(error)) from None
    return parse_values(tree, str(path))


def parse_values(tree: Any, source: str = "values") -> Values:
    """Check a values file's tree of plain values.

    Raises:
        ValuesError: names each wrong key, the value that came and what is allowed.
    """
    if not isinstance(tree, dict):
        raise ValuesError(f"{source} must hold a mapping of keys, found {type(tree).__name__}")
    try:
        return Values.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(problem)}" for problem in error.errors())
        raise ValuesError(f"{source} has {error.error_count()} problem(s):\n{problems}") from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {shown(repr(key))}"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):  # it may hold what no log should show
        return f"{key}: {message}"
    return f"{key}: {message}; got {shown(repr(problem['input']))}"
