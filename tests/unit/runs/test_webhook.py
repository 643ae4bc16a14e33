"""Webhooks as MLflow's own code signs them, and what isn't taken for one."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest

from piflow.runs.webhook import ALIAS_MOVED, Webhook, WebhookError, verify_webhook

SECRET = "a secret of the two"
DATA = {"name": "emoji-flux", "alias": "champion", "version": "3"}
NOW = 1_800_000_000


def sent(
    secret: str = SECRET, time: str = str(NOW), **content: Any
) -> tuple[dict[str, str], bytes]:
    """Headers and body as a server sends them, signed by MLflow's own function."""
    delivery = pytest.importorskip("mlflow.webhooks.delivery")
    tree = {"entity": "model_version_alias", "action": "created", "timestamp": "x", "data": DATA}
    body = json.dumps(tree | content)
    headers = {
        "Content-Type": "application/json",
        delivery.WEBHOOK_DELIVERY_ID_HEADER: "an-id",
        delivery.WEBHOOK_TIMESTAMP_HEADER: time,
        delivery.WEBHOOK_SIGNATURE_HEADER: delivery._generate_hmac_signature(
            secret, "an-id", time, body
        ),
    }
    return headers, body.encode()


def test_what_the_server_signed_is_taken() -> None:
    headers, body = sent()
    expected = Webhook("an-id", ALIAS_MOVED, DATA)
    assert verify_webhook(headers, body, SECRET, now=NOW) == expected
    lower = {name.lower(): value for name, value in headers.items()}
    assert verify_webhook(lower, body, SECRET, now=NOW + 299.0) == expected
    assert verify_webhook(headers, body, SECRET, now=NOW - 299.0) == expected


def test_the_signature_is_hmac_of_id_time_and_body() -> None:
    digest = hmac.new(b"k", b"id.7.{}", hashlib.sha256).digest()
    headers = {
        "X-MLflow-Signature": f"v1,{base64.b64encode(digest).decode()}",
        "X-MLflow-Timestamp": "7",
        "X-MLflow-Delivery-Id": "id",
    }
    with pytest.raises(WebhookError, match="expected a webhook with entity, action and data"):
        verify_webhook(headers, b"{}", "k", now=7)


@pytest.mark.parametrize("part", ["body", "secret", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"])
def test_every_part_is_signed(part: str) -> None:
    headers, body = sent()
    secret = SECRET
    if part == "body":
        body = body.replace(b'"3"', b'"4"')
    elif part == "secret":
        secret = SECRET[:-1]
    else:
        headers[part] = headers[part][:-1] + "1"
    with pytest.raises(WebhookError, match="the signature is not the secret's"):
        verify_webhook(headers, body, secret, now=NOW)


@pytest.mark.parametrize("signature", ["", "v1,", "v1", "é", "v2,{0}", "{0}", "v1,{0}=", " v1,{0}"])
def test_another_signature(signature: str) -> None:
    headers, body = sent()
    plain = headers["X-MLflow-Signature"].removeprefix("v1,")
    headers["X-MLflow-Signature"] = signature.format(plain)
    with pytest.raises(WebhookError):
        verify_webhook(headers, body, SECRET, now=NOW)


@pytest.mark.parametrize(
    "name", ["X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"]
)
def test_a_missing_header_is_named(name: str) -> None:
    headers, body = sent()
    del headers[name]
    with pytest.raises(WebhookError, match=f"has no {name.lower()}: not a signed webhook"):
        verify_webhook(headers, body, SECRET, now=NOW)


def test_old_and_future_ones_are_refused() -> None:
    headers, body = sent()
    with pytest.raises(WebhookError, match="signed 301 s ago; expected at most 300 s"):
        verify_webhook(headers, body, SECRET, now=NOW + 301)
    with pytest.raises(WebhookError, match="signed -301 s ago"):
        verify_webhook(headers, body, SECRET, now=NOW - 301)
    with pytest.raises(WebhookError, match="signed 11 s ago; expected at most 10 s"):
        verify_webhook(headers, body, SECRET, now=NOW + 11, max_age=10)
    with pytest.raises(WebhookError, match="s ago"):
        verify_webhook(*sent(time="7"), SECRET)  # by this machine's clock
    for time in ("1e9", "", "-5", "٣", "1" * 400):
        with pytest.raises(WebhookError):
            verify_webhook(*sent(time=time), SECRET, now=NOW)


def test_what_is_signed_and_is_no_webhook() -> None:
    for content in ({"data": []}, {"entity": 1}, {"action": None}):
        with pytest.raises(WebhookError, match="expected a webhook"):
            verify_webhook(*sent(**content), SECRET, now=NOW)
    with pytest.raises(WebhookError, match="the body has .* expected at most 1048576"):
        verify_webhook(*sent(data={"name": "x" * 2**20}), SECRET, now=NOW)
    with pytest.raises(ValueError, match="expected the webhook's secret, got an empty one"):
        verify_webhook(*sent(secret=""), "", now=NOW)
