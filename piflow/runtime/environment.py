"""Keys and tokens of the driver, for the workers of a cluster's other machines.

driver's environment --> hook, in the cluster's own key-value store --> every process of the job

They are neither in the job's runtime environment, which the jobs API and the dashboard give back,
nor in any log: Ray runs the hook in each process as it starts, before it takes work, and only the
hook holds the values. What a machine has itself stays: a role or keys of its own are its rights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

_SHORTEST_SECRET = 6  # characters: shorter ones are words that stand in any text

_SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "HF_TOKEN",
    "RAY_AUTH_TOKEN",
)


@dataclass(frozen=True)
class Group:
    """Variables that belong together.

    Attributes:
        names: which a worker gets.
        others: which say as well that the machine has its own.
    """

    names: tuple[str, ...]
    others: tuple[str, ...] = ()


GROUPS = (
    Group(
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        (
            "AWS_PROFILE",
            "AWS_ROLE_ARN",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_SHARED_CREDENTIALS_FILE",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        ),
    ),
    Group(("AWS_REGION", "AWS_DEFAULT_REGION")),
    Group(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")),
    Group(
        (
            "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN",
            "AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET",
        ),
        ("AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_CERTIFICATE_PATH"),
    ),
    Group(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")),
    Group(("MLFLOW_TRACKING_INSECURE_TLS",)),
    Group(("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")),
    Group(("MLFLOW_S3_ENDPOINT_URL", "MLFLOW_S3_IGNORE_TLS")),  # of artifacts
    Group(("PGPASSWORD",)),
    Group(("HF_TOKEN",)),
    Group(("HF_ENDPOINT",)),
    Group(
        (
            "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
            "http_proxy", "https_proxy", "all_proxy", "no_proxy",
        )
    ),
)  # fmt: skip
"""All that is forwarded. Names of files aren't: other machines lack the files."""


def worker_setup(environment: Mapping[str, str]) -> Callable[[], None] | None:
    """What Ray shall run first in every worker process; None: there is nothing to forward."""
    names = [name for group in GROUPS for name in group.names]
    values = {name: environment[name] for name in names if environment.get(name)}
    if not values:
        return None

    def set_keys_and_tokens() -> None:
        add_missing(values, os.environ)

    return set_keys_and_tokens


def add_missing(values: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    """Set the groups of which the environment has nothing."""
    for group in GROUPS:
        if not any(environment.get(name) for name in (*group.names, *group.others)):
            for name in group.names:
                if name in values:
                    environment[name] = values[name]


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """A text for the terminal, without the values of the environment's keys and tokens."""
    for name in _SECRETS:
        value = environment.get(name, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"<{name}>")
    return text
