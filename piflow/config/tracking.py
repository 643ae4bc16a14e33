"""MLflow."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from pydantic import field_validator

from piflow import storage
from piflow.config.section import Section, Text
from piflow.storage.foreign import shown

_SERVERS = ("http", "https")

_DATABASES = ("postgresql", "mysql", "mssql")  # of SQLAlchemy; "+driver" may follow

_EXPECTED = "expected http(s)://host:port, a database's URI (postgresql://...) or sqlite:///path"

_SECRET_OPTION = re.compile(r"pass|pwd|secret|token|credential|api_?key|odbc_connect", re.I)


def _tracking_uri(uri: str) -> str:
    """The URI, with an absolute path if it is a SQLite file: workers have other folders.

    Raises:
        ValueError: it is none of MLflow's servers and databases, or holds a password; the message
            doesn't repeat that.
    """
    storage.require_plain(uri)
    kind, separator, rest = uri.partition("://")
    kind = kind.partition("+")[0]
    if kind == "sqlite" and separator:
        return _absolute_sqlite(uri, rest)
    place, _, options = rest.partition("?")
    login, at, host = place.rpartition("@")
    if not separator or kind not in (*_SERVERS, *_DATABASES) or not host.partition("/")[0]:
        raise ValueError(_EXPECTED)
    if kind in _SERVERS and at:
        raise ValueError(
            "it holds a password, which would end up in logs; expected http(s)://host:port, with "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
    if ":" in login:
        raise ValueError(
            "it holds a password, which would end up in logs; expected "
            f"{kind}://user@host/database, with the password in the environment "
            "(PostgreSQL: PGPASSWORD, or ~/.pgpass) or in the driver's option file (MySQL: "
            "?read_default_file=/home/…/.my.cnf)"
        )
    if secret := [name for name, _ in parse_qsl(options, True) if _SECRET_OPTION.search(name)]:
        raise ValueError(
            f"its option {shown(secret[0])} holds a secret, which would end up in logs; give it in "
            "the environment or the driver's option file"
        )
    return uri


def _absolute_sqlite(uri: str, rest: str) -> str:
    path, question, query = rest.partition("?")
    if not path.startswith("/") or not path.strip("/") or path == "/:memory:":
        raise ValueError(
            "SQLite needs a file: expected sqlite:///path.db, or sqlite:////folder/path.db"
        )
    whole = storage.absolute(path.removeprefix("/"))
    return f"{uri.partition('://')[0]}:///{whole}{question}{query}"


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server, or a database without its password; default: SQLite in the run folder. The
    path of sqlite:///path starts where the command does.
    """

    experiment: Text = "piflow"
    """Created when missing."""

    model_name: Text | None = None
    """Registered model; default: the recipe's name."""

    system_metrics: bool = False
    """With the training metrics also system/MACHINE/*: CPU, memory, disk, network and GPUs of each
    machine with workers, by its address, or its MLFLOW_SYSTEM_METRICS_NODE_ID.
    """

    @field_validator("uri")
    @classmethod
    def _is_a_server_or_database(cls, uri: str | None) -> str | None:
        return None if uri is None else _tracking_uri(uri)

    @field_validator("model_name")
    @classmethod
    def _is_a_model_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or any(mark in name for mark in "/:")):
            raise ValueError("expected a name without '/' and ':', which MLflow gives to no model")
        return name
