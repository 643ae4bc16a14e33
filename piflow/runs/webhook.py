"""Webhooks of an MLflow server, for whoever receives them: is one genuine and new, and what of?

MLflow signs ``DELIVERY_ID.TIMESTAMP.BODY`` by HMAC-SHA256 with the secret that the webhook was made
with (``mlflow.webhooks.delivery`` of MLflow 3). Needs nothing but Python.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from piflow.storage.foreign import ForeignDataError, parse_object, shown

ALIAS_MOVED = "model_version_alias.created"
"""The event of an alias that is set, or moves to another version."""

MAX_AGE = 300.0
"""Seconds."""

MAX_BYTES = 2**20
"""Of a webhook's body."""

_SIGNATURE = "x-mlflow-signature"
_TIMESTAMP = "x-mlflow-timestamp"
_DELIVERY = "x-mlflow-delivery-id"
_VERSION = "v1"


class WebhookError(ValueError):
    """A request that is no webhook of the server's, or an old one: do nothing for it."""


@dataclass(frozen=True)
class Webhook:
    """What a server says has happened.

    Attributes:
        delivery_id: the same for every try to deliver it.
        event: such as `ALIAS_MOVED`.
        data: of the event; an alias's has ``name`` (of the model), ``alias`` and ``version``.
    """

    delivery_id: str
    event: str
    data: Mapping[str, Any]


def verify_webhook(
    headers: Mapping[str, str],
    body: bytes,
    secret: str,
    *,
    now: float | None = None,
    max_age: float = MAX_AGE,
) -> Webhook:
    """What a request says, if an MLflow server that knows the secret has sent it, and lately.

    A request that was overheard is taken again until it is `max_age` old, and MLflow itself tries
    more than once: what is done for it must be safe to do twice, such as serving the version that
    the alias has now.

    Args:
        headers: of the request; names in any case.
        body: as it came, not parsed and written again.
        secret: that the webhook was made with.
        now: Unix time; default: this machine's.
        max_age: seconds between now and the time that the server signed, either way.

    Raises:
        WebhookError: a header is missing, the signature is another, or it is too old; or the body
            is no webhook.
    """
    if not secret:
        raise ValueError("expected the webhook's secret, got an empty one")
    found = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in (_SIGNATURE, _TIMESTAMP, _DELIVERY) if not found.get(name)]
    if missing:
        raise WebhookError(f"the request has no {', '.join(missing)}: not a signed webhook")
    delivery, timestamp = found[_DELIVERY], found[_TIMESTAMP]
    if len(body) > MAX_BYTES:
        raise WebhookError(f"the body has {len(body)} bytes; expected at most {MAX_BYTES}")
    signed = f"{delivery}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    expected = f"{_VERSION},{base64.b64encode(digest).decode()}"
    if not hmac.compare_digest(expected.encode(), found[_SIGNATURE].encode()):
        raise WebhookError("the signature is not the secret's")
    if not re.fullmatch(r"\d{1,12}", timestamp):
        raise WebhookError(f"expected Unix seconds, got {shown(repr(timestamp))}")
    age = (time.time() if now is None else now) - int(timestamp)
    if abs(age) > max_age:
        raise WebhookError(f"it was signed {age:.0f} s ago; expected at most {max_age:.0f} s")
    return _content(delivery, body)


def _content(delivery: str, body: bytes) -> Webhook:
    try:
        tree = parse_object(body, where="the webhook", max_bytes=MAX_BYTES)
    except ForeignDataError as error:
        raise WebhookError(str(error)) from None
    entity, action, data = tree.get("entity"), tree.get("action"), tree.get("data")
    if not isinstance(entity, str) or not isinstance(action, str) or not isinstance(data, dict):
        raise WebhookError("expected a webhook with entity, action and data")
    return Webhook(delivery, f"{entity}.{action}", data)
