"""Ray's own bootstrap and machine starts with the committed file for AWS, against moto's EC2."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND

FILE = Path(__file__).parents[2] / "cluster" / "aws" / "cluster.yaml"
REGION, ZONE = "us-east-1", "us-east-1a"


@dataclass
class Account:
    """What a team has made before `ray up`."""

    ec2: Any
    config: dict[str, Any]  # the file, with this account's ids


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Account]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "piflow.pem").write_text("key")
    with mock_aws():
        ec2, iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20", AvailabilityZone=ZONE)
        group = ec2.create_security_group(GroupName="piflow", Description="own", VpcId=vpc)
        ec2.create_key_pair(KeyName="piflow")
        arns = {}
        for name in ("piflow-head", "piflow-worker"):
            profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]
            arns[name] = profile["Arn"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        text = FILE.read_text()
        text = text.replace("subnet-0123456789abcdef0", subnet["Subnet"]["SubnetId"])
        text = text.replace("sg-0123456789abcdef0", group["GroupId"])
        text = text.replace("ami-0123456789abcdef0", image)
        for name, arn in arns.items():
            text = text.replace(f"arn:aws:iam::111122223333:instance-profile/{name}", arn)
        yield Account(ec2, yaml.safe_load(text))


def start(config: dict[str, Any], kind: str, count: int) -> dict[str, Any]:
    """As the autoscaler starts machines of a kind; returns what it asked EC2 for."""
    asked: dict[str, Any] = {}
    provider = AWSNodeProvider(config["provider"], f"test-{uuid.uuid4().hex[:6]}")
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_CLUSTER_NAME: provider.cluster_name}
    node = copy.deepcopy(config["available_node_types"][kind]["node_config"])
    events = provider.ec2_fail_fast.meta.client.meta.events
    events.register(
        "before-parameter-build.ec2.RunInstances", lambda params, **_: asked.update(params)
    )
    provider.create_node(node, tags, count)
    return asked


def bootstrapped(account: Account) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(account.config))
    validate_config(prepared)
    return bootstrap_aws(prepared)


def test_bootstrap_makes_no_group_role_or_key_of_its_own(account: Account) -> None:
    iam = boto3.client("iam", REGION)

    def made() -> tuple[int, int, int, int]:
        return (
            len(account.ec2.describe_security_groups()["SecurityGroups"]),
            len(account.ec2.describe_key_pairs()["KeyPairs"]),
            len(iam.list_roles()["Roles"]),
            len(iam.list_instance_profiles()["InstanceProfiles"]),
        )

    before = made()
    config = bootstrapped(account)
    assert made() == before
    (group,) = {
        group["GroupId"]
        for group in account.ec2.describe_security_groups()["SecurityGroups"]
        if group["GroupName"] == "piflow"
    }
    for kind in ("head", "cpu"):
        node = config["available_node_types"][kind]["node_config"]
        assert node["SecurityGroupIds"] == [group]
    rules = account.ec2.describe_security_group_rules()["SecurityGroupRules"]
    open_to_all = [
        rule for rule in rules if rule.get("CidrIpv4") == "0.0.0.0/0" and not rule["IsEgress"]
    ]
    assert open_to_all == []


@pytest.mark.parametrize(("kind", "count"), [("head", 1), ("cpu", 4), ("gpu", 2)])
def test_machines_start_as_the_file_says(account: Account, kind: str, count: int) -> None:
    config = bootstrapped(account)
    asked = start(config, kind, count)
    assert asked["MaxCount"] == count
    reservations = account.ec2.describe_instances()["Reservations"]
    machines = [machine for entry in reservations for machine in entry["Instances"]]
    assert machines, "moto starts the fewest that would do"
    node = account.config["available_node_types"][kind]["node_config"]
    for key in ("Placement", "NetworkInterfaces", "BlockDeviceMappings"):
        assert asked.get(key) == node.get(key)  # moto keeps less of them
    for machine in machines:
        assert machine["InstanceType"] == node["InstanceType"]
        assert machine["IamInstanceProfile"]["Arn"] == node["IamInstanceProfile"]["Arn"]
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert (machine.get("InstanceLifecycle") == "spot") == (kind == "cpu")


def test_the_gpu_machine_has_as_many_gpus_and_efa_cards_as_the_file_says(
    account: Account,
) -> None:
    """moto's table of instance types is Amazon's."""
    for kind in account.config["available_node_types"].values():
        node = kind["node_config"]
        (type_,) = account.ec2.describe_instance_types(InstanceTypes=[node["InstanceType"]])[
            "InstanceTypes"
        ]
        gpus = sum(gpu["Count"] for gpu in type_.get("GpuInfo", {}).get("Gpus", []))
        assert kind["resources"].get("GPU", 0) == gpus
        assert kind["resources"]["CPU"] <= type_["VCpuInfo"]["DefaultVCpus"]
        if "NetworkInterfaces" in node:
            efa = type_["NetworkInfo"]["EfaInfo"]["MaximumEfaInterfaces"]
            assert len(node["NetworkInterfaces"]) == efa


def test_a_planted_argument_is_refused(account: Account) -> None:
    config = bootstrapped(account)
    config["available_node_types"]["cpu"]["node_config"]["InstanceTyp"] = "m7i.large"
    with pytest.raises(Exception, match="InstanceTyp"):
        start(config, "cpu", 1)


def test_a_subnet_and_a_group_beside_network_interfaces_are_refused(account: Account) -> None:
    node = account.config["available_node_types"]["gpu"]["node_config"]
    node["SecurityGroupIds"] = ["sg-1"]
    with pytest.raises(ValueError, match="NetworkInterfaces"):
        bootstrapped(account)
