"""Values of targets without Kubernetes: virtual machines, one's own machines, Slurm, SkyPilot."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from piflow.jobs.strict import NonNegative, Positive, Strict

Market = Literal["on-demand", "spot"]


class SshValues(Strict):
    """How `ray up` reaches machines."""

    ssh_user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]*$")]
    """Who may use docker there."""

    ssh_private_key: str
    """Path of the key on the machine that calls `ray up`."""


class AwsValues(SshValues):
    """Target aws: EC2 machines in a private subnet; `ray up` reaches them by inner addresses."""

    region: Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$")]
    """Such as us-east-1."""

    availability_zone: Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-\d[a-z]$")]
    """One, since GPU machines must be near one another."""

    ami: Annotated[str, Field(pattern=r"^ami-[0-9a-f]+$")]
    """With Docker, NVIDIA's driver and container toolkit, and EFA's driver."""

    subnet: Annotated[str, Field(pattern=r"^subnet-[0-9a-f]+$")]
    """Private, in that zone, with a way to S3."""

    security_group: Annotated[str, Field(pattern=r"^sg-[0-9a-f]+$")]
    """Open within itself, which EFA needs, and for SSH from where `ray up` is called. Without one
    Ray would make one that is open for SSH to everyone.
    """

    key_name: str
    """EC2 key pair of ssh_private_key."""

    head_profile: Annotated[str, Field(pattern=r"^arn:aws[\w-]*:iam::\d{12}:instance-profile/")]
    """Instance profile that may start and end machines, and use the bucket. Without one Ray would
    attach full rights to EC2 and S3.
    """

    worker_profile: Annotated[str, Field(pattern=r"^arn:aws[\w-]*:iam::\d{12}:instance-profile/")]
    """Instance profile that may use the bucket."""

    head_type: str
    """Instance type."""

    cpu_type: str
    """Instance type."""

    gpu_type: str
    """Instance type, such as p5.48xlarge or p4d.24xlarge."""

    cpu_market: Market = "spot"
    """What runs on CPU machines is done again where one goes."""

    gpu_market: Market = "on-demand"
    """spot: each machine waits for Amazon's notice, 120 s before its end, and its workers save."""

    on_rebalance: Literal["tell", "drain"] = "tell"
    """When EC2 says that a spot machine is at elevated risk, without a time: tell says so in the
    watcher's log and waits for the notice; drain leaves the machine at once, which may have lived
    for hours.
    """

    efa_cards: NonNegative = 0
    """Network cards with EFA of a GPU machine: 32 of p5.48xlarge, 4 of p4d.24xlarge."""

    placement_group: str | None = None
    """An existing one (cluster strategy) for GPU machines."""

    disk_gb: Positive = 500
    """Of each machine."""


class GcpValues(SshValues):
    """Target gcp: Compute Engine machines."""

    project: str
    """Project id."""

    region: str
    """Such as us-central1."""

    zone: str
    """One, since GPU machines must be near one another."""

    source_image: Annotated[str, Field(pattern=r"^projects/[\w-]+/global/images/[\w-]+$")]
    """An image, not a family: with Docker, NVIDIA's driver and container toolkit."""

    subnet: Annotated[str, Field(pattern=r"^projects/[\w-]+/regions/[\w-]+/subnetworks/[\w-]+$")]
    """Without addresses of the internet; with a way to storage."""

    service_account: Annotated[str, Field(pattern=r"^[\w.-]+@[\w.-]+\.iam\.gserviceaccount\.com$")]
    """Of workers: rights to the bucket."""

    head_service_account: Annotated[
        str, Field(pattern=r"^[\w.-]+@[\w.-]+\.iam\.gserviceaccount\.com$")
    ]
    """Of the head: also to start and end machines."""

    head_type: str
    """Machine type."""

    cpu_type: str
    """Machine type."""

    gpu_type: str
    """Machine type, such as a3-highgpu-8g."""

    gpu_market: Market = "on-demand"
    """As with aws; the notice comes 30 s before the end."""

    disk_gb: Positive = 500
    """Of each machine."""


class OnPremiseValues(SshValues):
    """Target on-premise: machines that are there, with Docker, reached by SSH."""

    head: str
    """Address of the head."""

    workers: Annotated[list[str], Field(min_length=1)]
    """Addresses of GPU machines; or of CPU machines, if the recipe needs no GPUs."""


class SlurmValues(Strict):
    """Target slurm: a batch script. Machines have GPUs as gpu_machines says, or none."""

    partition: Annotated[str, Field(pattern=r"^[\w.,-]+$")]
    """Where it runs."""

    account: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Who pays."""

    gpu_type: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Slurm's name of the kind of GPU, where there are several."""

    container: bool = True
    """Run in the image (by pyxis and enroot); false: setup brings piflow's environment."""

    mounts: list[Annotated[str, Field(pattern=r"^/[\w./-]+$")]] = []
    """Folders of the machines that the container sees under the same path."""

    setup: list[str] = []
    """Shell lines before all others, e.g. 'source /shared/piflow/bin/activate'."""


class SkyValues(Strict):
    """Target sky: a SkyPilot task. Machines have GPUs as gpu_machines says, or none."""

    infra: Annotated[str, Field(pattern=r"^[\w*./-]+$")]
    """Cloud, region, zone, such as aws/us-east-1."""

    accelerator: str | None = None
    """SkyPilot's name of the kind of GPU, such as H100; needed by recipes with GPUs."""

    market: Market = "on-demand"
    """spot: SkyPilot's managed jobs start again elsewhere, from the newest checkpoint."""

    disk_gb: Positive = 500
    """Of each machine."""

    secrets: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]] = []
    """Names of variables that `sky` takes from the environment that calls it, e.g. HF_TOKEN."""
