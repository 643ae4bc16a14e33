"""The image's recipe by hadolint, and the policies for AWS enforced by moto."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws, settings

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
DOCKERFILE = INFRA / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
AUDIT = REPOSITORY / ".venv-audit" / "bin"
BUCKET = "example-piflow"


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    command = [HADOLINT, "--failure-threshold", "info", file]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_dockerfile_passes_hadolint() -> None:
    done = hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_a_planted_mistake_is_found_by_hadolint(tmp_path: Path) -> None:
    planted = tmp_path / "Dockerfile"
    planted.write_text(DOCKERFILE.read_text().replace("FROM ${BASE_IMAGE} AS", "FROM python AS"))
    done = hadolint(planted)
    assert done.returncode == 1 and "DL3006" in done.stdout


def test_the_image_has_no_root_no_secret_and_no_base_of_its_own() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^ARG BASE_IMAGE$", text, re.M), "it must be given"
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${BASE_IMAGE}"}
    assert re.findall(r"^USER (\S+)", text, re.M)[-1] == "1000:1000"
    assert not re.search(r"(TOKEN|SECRET|PASSWORD)=", text)


def test_what_the_image_copies_is_let_through_and_nothing_else() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for names in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.M):
        copied |= set(names.split())
    assert lines[1] == "*" and copied == let_through
    assert all((REPOSITORY / name).exists() for name in copied)


def policy(role: str) -> str:
    text = (INFRA / "aws" / f"{role}-policy.json").read_text()
    return text.replace("BUCKET", BUCKET).replace("ACCOUNT", "123456789012")


@pytest.fixture
def as_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 client with the worker's rights alone, on a bucket that holds a model and a run."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        admin, iam = boto3.client("s3"), boto3.client("iam")
        for bucket in (BUCKET, "of-others"):
            admin.create_bucket(Bucket=bucket)
            for key in ("models/a", "runs/a"):
                admin.put_object(Bucket=bucket, Key=key, Body=b"x")
        iam.create_user(UserName="worker")
        iam.put_user_policy(UserName="worker", PolicyName="worker", PolicyDocument=policy("worker"))
        key = iam.create_access_key(UserName="worker")["AccessKey"]
        client = boto3.client(
            "s3",
            aws_access_key_id=key["AccessKeyId"],
            aws_secret_access_key=key["SecretAccessKey"],
        )
        monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from here on
        yield client


def test_a_worker_reads_the_bucket_and_writes_runs_and_stores(as_worker: Any) -> None:
    assert as_worker.get_object(Bucket=BUCKET, Key="models/a")["Body"].read() == b"x"
    assert as_worker.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 2
    for key in ("runs/b", "stores/b"):
        as_worker.put_object(Bucket=BUCKET, Key=key, Body=b"y")
        as_worker.delete_object(Bucket=BUCKET, Key=key)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("put_object", {"Bucket": BUCKET, "Key": "models/a", "Body": b"z"}),
        ("delete_object", {"Bucket": BUCKET, "Key": "models/a"}),
        ("delete_bucket", {"Bucket": BUCKET}),
        ("get_object", {"Bucket": "of-others", "Key": "runs/a"}),
        ("put_object", {"Bucket": "of-others", "Key": "runs/b", "Body": b"z"}),
        ("list_objects_v2", {"Bucket": "of-others"}),
    ],
)
def test_a_worker_may_do_nothing_else(as_worker: Any, call: str, arguments: Any) -> None:
    with pytest.raises(ClientError, match="AccessDenied"):
        getattr(as_worker, call)(**arguments)


def test_no_policy_gives_everything_away() -> None:
    for role in ("head", "worker"):
        for statement in json.loads(policy(role))["Statement"]:
            assert not [action for action in statement["Action"] if action.endswith("*")]
            assert statement["Resource"] != "*" or "Condition" in statement


def test_an_environment_is_listed_offline_as_the_image_is(tmp_path: Path) -> None:
    """The Dockerfile's own command, on the environment that these tests run in."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    (command,) = re.findall(r"/opt/sbom/bin/cyclonedx-py (.*)", text)
    listed = tmp_path / "sbom.json"
    words = command.split()
    words[words.index("/opt/piflow/bin/python")] = sys.executable
    words[words.index("/opt/piflow/sbom.cdx.json")] = str(listed)
    offline = ["unshare", "--net", AUDIT / "cyclonedx-py", *words]
    subprocess.run(offline, check=True, capture_output=True, timeout=300)
    tree = json.loads(listed.read_text())
    found = {part["name"]: part["version"] for part in tree["components"]}
    assert tree["bomFormat"] == "CycloneDX"
    for name in ("torch", "ray", "diffusers"):
        assert found[name] == version(name)


def version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)
