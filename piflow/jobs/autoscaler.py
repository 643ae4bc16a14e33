"""Files for `ray up`: machines that Ray's own autoscaler starts and ends, or that are there.

Ray's defaults install a nightly wheel, show the dashboard to the world and make security groups
and roles with wide rights; here every one of those keys is given.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from piflow.config import Recipe
from piflow.jobs.demand import Demand, Group
from piflow.jobs.kuberay import run_name
from piflow.jobs.machines import AwsValues, GcpValues, Market, OnPremiseValues, SshValues
from piflow.jobs.values import Values

Config = dict[str, Any]

HEAD = "head"
_PORT = 6379
_ADDRESS = "RAY_API_SERVER_ADDRESS"  # of the dashboard
_MOUNTS = {"~/.ray/auth_token": "~/.ray/auth_token", "~/recipe.yaml": "recipe.yaml"}
_WATCHER_LOCK, _WATCHER_LOG = "~/.piflow-watch-spot.lock", "~/piflow-watch-spot.log"
_SHM_SHARE = 0.4  # of the memory: Ray's object store takes 0.3, NCCL and loaders some more
_ON_PREMISE_TYPE = "local.cluster.node"  # Ray's name of the one kind that it knows there


def aws(recipe: Recipe, values: Values, aws: AwsValues, needed: Demand) -> Config:
    """A head, CPU machines and GPU machines on EC2."""
    types = {HEAD: _node_type(0, None, _ec2(aws, aws.head_type, aws.head_profile))}
    for group in needed.groups:
        market = aws.gpu_market if group.gpus else aws.cpu_market
        kind = aws.gpu_type if group.gpus else aws.cpu_type
        node = _ec2(aws, kind, aws.worker_profile)
        if market == "spot":
            options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
            node["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
        if group.gpus:
            _near_one_another(node, aws)
        efa = bool(group.gpus and aws.efa_cards)
        types[group.name] = _node_type(group.most, group, node, _run_options(group, efa))
    provider = {
        "type": "aws",
        "region": aws.region,
        "availability_zone": aws.availability_zone,
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
    }
    config = _config(recipe, values, aws, provider, types)
    if "spot" in (aws.cpu_market, aws.gpu_market):
        _have_notices_watched(config, "aws", "--on-rebalance", aws.on_rebalance)
    return config


def gcp(recipe: Recipe, values: Values, gcp: GcpValues, needed: Demand) -> Config:
    """A head, CPU machines and GPU machines on Compute Engine."""
    head = _instance(gcp, gcp.head_type, gcp.head_service_account, "on-demand")
    types = {HEAD: _node_type(0, None, head)}
    for group in needed.groups:
        market = gcp.gpu_market if group.gpus else "spot"
        kind = gcp.gpu_type if group.gpus else gcp.cpu_type
        node = _instance(gcp, kind, gcp.service_account, market)
        types[group.name] = _node_type(group.most, group, node, _run_options(group, efa=False))
    provider = {
        "type": "gcp",
        "region": gcp.region,
        "availability_zone": gcp.zone,
        "project_id": gcp.project,
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
    }
    config = _config(recipe, values, gcp, provider, types)
    _have_notices_watched(config, "gcp")  # CPU machines are spot machines
    return config


def on_premise(recipe: Recipe, values: Values, own: OnPremiseValues, needed: Demand) -> Config:
    """Machines that are there: Ray starts on them and ends, they stay.

    Raises:
        ValueError: there are fewer than the recipe needs.
    """
    group = needed.groups[0]
    if len(own.workers) < max(group.fewest, 1):
        raise ValueError(
            f"the recipe needs at least {max(group.fewest, 1)} {group.name} machine(s), and "
            f"on_premise.workers has {len(own.workers)}; add some, or use fewer workers"
        )
    provider = {"type": "local", "head_ip": own.head, "worker_ips": list(own.workers)}
    config = _config(recipe, values, own, provider, {})
    count = len(own.workers)
    options = _run_options(group, efa=False)
    config["docker"]["run_options"] += options
    return config | {"min_workers": count, "max_workers": count}


def submit_script(overrides: Sequence[str], *, machines_come: bool) -> str:
    """A shell script that submits the recipe beside it, to the cluster of `cluster.yaml`.

    Args:
        overrides: of the rendering, which the job must have as well.
        machines_come: whether an autoscaler starts machines that a job asks for.
    """
    options = [part for override in overrides for part in ("--set", override)]
    if machines_come:
        options.append("--wait-for-nodes")
    words = [f"{shlex.quote(option)} " for option in options]
    lines = [
        "#!/bin/bash",
        "# Written by `piflow render`: change the recipe or the values, and render again.",
        "# Runs the recipe's stages as one job, attaches to it, or goes on; needs the tunnel that",
        "# `ray dashboard cluster.yaml` opens. Takes the options of `piflow submit`, as --follow.",
        "set -euo pipefail",
        "export RAY_AUTH_MODE=token",
        f'export {_ADDRESS}="${{{_ADDRESS}:-http://127.0.0.1:8265}}"',
        f'exec piflow submit "$(dirname "$0")/recipe.yaml" {"".join(words)}"$@"',
    ]
    return "\n".join(lines) + "\n"


def _config(
    recipe: Recipe,
    values: Values,
    ssh: SshValues,
    provider: Config,
    types: dict[str, Config],
) -> Config:
    config: Config = {
        "cluster_name": run_name(recipe, values),
        "max_workers": sum(kind["max_workers"] for kind in types.values()),
        "upscaling_speed": 100.0,  # all machines of a job at once
        "idle_timeout_minutes": values.limits.idle_minutes,
        "provider": provider,
        "auth": {"ssh_user": ssh.ssh_user, "ssh_private_key": ssh.ssh_private_key},
        "docker": {
            "image": values.image,
            "container_name": "piflow",
            "pull_before_run": True,
            "run_options": [
                "--ulimit nofile=65536:65536",
                "--security-opt no-new-privileges",
                *(
                    f"--env {shlex.quote(f'{key}={value}')}"
                    for key, value in values.environment.items()
                ),
            ],
        },
        "file_mounts": dict(_MOUNTS),
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", _start_head(values)],
        "worker_start_ray_commands": ["ray stop", _start_worker(values)],
    }
    if types:
        config |= {"available_node_types": types, "head_node_type": HEAD}
    return config


def _start_head(values: Values) -> str:
    """The dashboard is reached through SSH (`ray dashboard`), and asks for the token."""
    return (
        "chmod 600 ~/.ray/auth_token && RAY_AUTH_MODE=token "
        f"RAY_JOB_STOP_WAIT_TIME_S={values.saving_seconds} "
        f"ray start --head --port={_PORT} --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml"
    )


def _start_worker(values: Values) -> str:
    return (
        "chmod 600 ~/.ray/auth_token && RAY_AUTH_MODE=token "
        f"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S={values.saving_seconds} "
        f"ray start --address=$RAY_HEAD_IP:{_PORT}"
    )


def _have_notices_watched(config: Config, cloud: str, *options: str) -> None:
    """Each worker waits for its cloud's notice and has Ray drain it; one watcher a machine.

    Ray starts the same on every kind of machine: one that isn't of the spot market gets no notice.
    """
    watcher = ["piflow", "watch-spot", "--cloud", cloud, *options]
    config["worker_start_ray_commands"].append(
        f"RAY_AUTH_MODE=token setsid flock --nonblock {_WATCHER_LOCK} {shlex.join(watcher)} "
        f"--address $RAY_HEAD_IP:{_PORT} >> {_WATCHER_LOG} 2>&1 < /dev/null &"
    )


def _node_type(
    most: int, group: Group | None, node: Config, options: list[str] | None = None
) -> Config:
    """A kind of machine; what Ray counts there is what the recipe's figures were made with."""
    resources = {"CPU": 0} if group is None else {"CPU": group.cpus, "GPU": group.gpus}
    kind: Config = {
        "resources": resources,
        "min_workers": 0,
        "max_workers": most,
        "node_config": node,
    }
    if options:
        kind["docker"] = {"worker_run_options": options}
    return kind


def _run_options(group: Group, efa: bool) -> list[str]:
    """Of the container, which has the machine to itself."""
    options = [f"--shm-size={max(1, int(group.memory_gib * _SHM_SHARE))}g"]
    if group.gpus:
        options += ["--gpus all", "--ulimit memlock=-1:-1"]
    if efa:
        options += [
            "--device /dev/infiniband",
            "--cap-add IPC_LOCK",
            "--env FI_EFA_USE_HUGE_PAGE=0",
            "--env NCCL_SOCKET_IFNAME=^lo,docker,veth",
        ]
    return options


def _ec2(aws: AwsValues, kind: str, profile: str) -> Config:
    """Arguments of RunInstances: an encrypted disk, and tokens for the metadata service."""
    disk = {"VolumeSize": aws.disk_gb, "VolumeType": "gp3", "Encrypted": True}
    return {
        "InstanceType": kind,
        "ImageId": aws.ami,
        "KeyName": aws.key_name,
        "SubnetIds": [aws.subnet],
        "SecurityGroupIds": [aws.security_group],
        "IamInstanceProfile": {"Arn": profile},
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
    }


def _near_one_another(node: Config, aws: AwsValues) -> None:
    """A GPU machine's placement, and its EFA cards; those take subnet and group along."""
    if aws.placement_group is not None:
        node["Placement"] = {"GroupName": aws.placement_group}
    if not aws.efa_cards:
        return
    groups, (subnet,) = node.pop("SecurityGroupIds"), node.pop("SubnetIds")
    node["NetworkInterfaces"] = [
        {
            "NetworkCardIndex": card,
            "DeviceIndex": min(card, 1),
            "InterfaceType": "efa",
            "SubnetId": subnet,
            "Groups": list(groups),
            "DeleteOnTermination": True,
        }
        for card in range(aws.efa_cards)
    ]


def _instance(gcp: GcpValues, kind: str, account: str, market: Market) -> Config:
    """Arguments of Compute Engine's instances.insert."""
    scheduling: Config = {"onHostMaintenance": "TERMINATE", "automaticRestart": False}
    if market == "spot":
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    scope = "https://www.googleapis.com/auth/cloud-platform"
    return {
        "machineType": kind,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {
                    "diskSizeGb": gcp.disk_gb,
                    "sourceImage": gcp.source_image,
                },
            }
        ],
        "networkInterfaces": [{"subnetwork": gcp.subnet}],
        "serviceAccounts": [{"email": account, "scopes": [scope]}],
        "scheduling": [scheduling],
        "shieldedInstanceConfig": {"enableSecureBoot": False, "enableVtpm": True},
    }
