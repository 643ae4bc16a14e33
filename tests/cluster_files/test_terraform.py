"""infra/terraform/ by Terraform's own formatter and console, python-hcl2 and checkov.

No provider can be fetched where these tests run, so that nothing here is `terraform validate`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hcl2
import pytest

from piflow.jobs.machines import AwsValues, GcpValues

REPOSITORY = Path(__file__).parents[2]
TERRAFORM = REPOSITORY / "infra" / "terraform"
FOLDERS = ("aws", "gcp")
CHECKOV = REPOSITORY / ".venv-audit" / "bin" / "checkov"
NAMES = {
    "bucket": "example-piflow",
    "region": "eu-west-1",
    "name": "team",
    "account": "123456789012",
    "subnet": "subnet-0a",
    "security_group": "sg-0b",
}
needs_terraform = pytest.mark.skipif(
    shutil.which("terraform") is None, reason="there is no terraform on this machine"
)


def terraform(*arguments: str, folder: Path, text: str | None = None) -> Any:
    return subprocess.run(
        ["terraform", *arguments],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )


def read(folder: Path) -> dict[str, list[Any]]:
    """The blocks of all files, by kind."""
    blocks: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("*.tf")):
        for kind, found in hcl2.loads(path.read_text()).items():
            blocks.setdefault(kind, []).extend(found if isinstance(found, list) else [found])
    return blocks


def unknown_names(folder: Path) -> set[str]:
    """Resources, data, variables and locals that are used and stand nowhere."""
    text = "\n".join(path.read_text() for path in sorted(folder.glob("*.tf")))
    text = re.sub(r"(?m)^\s*#.*$", "", text)
    known = {f"{kind}.{name}" for kind, name in re.findall(r'resource "(\w+)" "(\w+)"', text)}
    known |= {f"data.{kind}.{name}" for kind, name in re.findall(r'data "(\w+)" "(\w+)"', text)}
    known |= {f"var.{name}" for name in re.findall(r'variable "(\w+)"', text)}
    for block in re.findall(r"(?ms)^locals \{\n(.*?)^\}", text):
        known |= {f"local.{name}" for name in re.findall(r"(?m)^  (\w+)\s+=", block)}
    pattern = r"(?<![\w.\"-])(data\.\w+\.\w+|(?:aws|google)_\w+\.\w+|var\.\w+|local\.\w+)"
    return set(re.findall(pattern, text)) - known


@pytest.mark.parametrize("name", FOLDERS)
def test_files_are_terraform_whose_names_all_stand_somewhere(name: str) -> None:
    blocks = read(TERRAFORM / name)
    assert {"terraform", "provider", "variable", "resource", "output"} <= set(blocks)
    assert unknown_names(TERRAFORM / name) == set()


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of infra/, to plant mistakes in; its terraform/aws."""
    shutil.copytree(REPOSITORY / "infra", tmp_path / "infra")
    return tmp_path / "infra" / "terraform" / "aws"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_a_planted_name_is_found(planted: Path) -> None:
    change(
        planted / "storage.tf", "bucket = aws_s3_bucket.this.id", "bucket = aws_s3_bucket.thiss.id"
    )
    change(planted / "roles.tf", "local.policies[", "local.policy[")
    assert unknown_names(planted) == {"aws_s3_bucket.thiss", "local.policy"}


def test_a_planted_brace_is_found(planted: Path) -> None:
    change(planted / "network.tf", 'resource "aws_vpc" "this" {', 'resource "aws_vpc" "this" {{')
    with pytest.raises(Exception, match="Unexpected token"):
        read(planted)


@needs_terraform
def test_files_are_formatted(planted: Path) -> None:
    assert terraform("fmt", "-check", "-recursive", folder=TERRAFORM).returncode == 0
    change(planted / "network.tf", "  cidr_block ", " cidr_block ")
    assert terraform("fmt", "-check", folder=planted).returncode == 3


# ------------------------------------------------------------------------------------- checkov


def findings(folder: Path) -> list[str]:
    """Checks that fail, with the resource."""
    command = [CHECKOV, "-d", folder, "--framework", "terraform", "--skip-download", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    results = json.loads(done.stdout)["results"]
    assert len(results["passed_checks"]) > 20
    return sorted(f"{check['check_id']} {check['resource']}" for check in results["failed_checks"])


@pytest.mark.parametrize("name", FOLDERS)
def test_checkov_finds_nothing(name: str) -> None:
    assert findings(TERRAFORM / name) == []


def test_planted_openings_are_found_by_checkov(planted: Path) -> None:
    change(planted / "storage.tf", "block_public_acls       = true", "block_public_acls = false")
    change(planted / "mlflow.tf", "storage_encrypted     = true", "storage_encrypted = false")
    change(planted / "mlflow.tf", "publicly_accessible    = false", "publicly_accessible = true")
    assert set(findings(planted)) == {
        "CKV_AWS_53 aws_s3_bucket_public_access_block.this",
        "CKV2_AWS_6 aws_s3_bucket.this",
        "CKV_AWS_16 aws_db_instance.mlflow",
        "CKV_AWS_17 aws_db_instance.mlflow",
    }


def test_every_skipped_check_has_its_reason() -> None:
    for path in TERRAFORM.rglob("*.tf"):
        for line in re.findall(r"checkov:skip.*", path.read_text()):
            assert re.fullmatch(r"checkov:skip=CKV2?_\w+:.{20,}", line), line


# ----------------------------------------------------------------------------- rights and values


@needs_terraform
def test_the_machines_rights_are_infra_aws_with_the_names_put_in(tmp_path: Path) -> None:
    """`policies.tf` as Terraform itself computes it, with the names of one account."""
    folder = tmp_path / "infra" / "terraform" / "aws"
    folder.mkdir(parents=True)
    shutil.copytree(REPOSITORY / "infra" / "aws", tmp_path / "infra" / "aws")
    shutil.copy(TERRAFORM / "aws" / "policies.tf", folder)
    (folder / "names.tf").write_text(
        "locals {\n"
        + "".join(f'{name} = "{NAMES[name]}"\n' for name in ("account", "subnet", "security_group"))
        + "}\n"
        + "".join(
            f'variable "{name}" {{ default = "{NAMES[name]}" }}\n'
            for name in ("bucket", "region", "name")
        )
    )
    done = terraform("console", folder=folder, text="jsonencode(local.policies)\n")
    assert done.returncode == 0, done.stderr
    policies = json.loads(json.loads(done.stdout))
    assert set(policies) == {"head", "worker"}
    for role, text in policies.items():
        expected = (REPOSITORY / "infra" / "aws" / f"{role}-policy.json").read_text()
        for name in ("bucket", "region", "account", "subnet", "security_group"):
            expected = re.sub(rf"\b{name.upper()}\b", NAMES[name], expected)
        expected = expected.replace("role/piflow-worker", "role/team-worker")
        assert json.loads(text) == json.loads(expected)
        assert not re.search(r"\b(BUCKET|REGION|ACCOUNT|SUBNET|SECURITY_GROUP)\b", text)


@pytest.mark.parametrize(("name", "values"), [("aws", AwsValues), ("gcp", GcpValues)])
def test_what_is_put_out_are_keys_of_the_values_file(name: str, values: type[Any]) -> None:
    text = "\n".join(path.read_text() for path in (TERRAFORM / name).glob("*.tf"))
    (block,) = re.findall(r'(?ms)^output "values" \{.*?value = \{\n(.*?)^  \}', text)
    keys = set(re.findall(r"(?m)^    (\w+)\s+=", block))
    assert len(keys) >= 5 and keys <= set(values.model_fields)


def test_no_password_stands_in_a_file_or_reaches_the_state() -> None:
    text = (TERRAFORM / "aws" / "mlflow.tf").read_text()
    assert "aws_secretsmanager_secret_version" not in text  # its content would be in the state
    assert "manage_master_user_password         = true" in text
    assert not re.search(r"(?i)password\s*=\s*\"", text)
