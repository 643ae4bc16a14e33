"""The dashboard, as its tests read it."""

from __future__ import annotations

import json
from pathlib import Path

INFRA = Path(__file__).parents[1] / "infra"
DASHBOARD = INFRA / "grafana" / "dashboards" / "piflow.json"


def queries(interval: str = "1m") -> list[tuple[str, str]]:
    """(panel's title, query) of all targets, for all runs; `interval` stands for Grafana's own."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        (
            panel["title"],
            target["expr"].replace("$__rate_interval", interval).replace("$run", ".*"),
        )
        for panel in panels
        for target in panel.get("targets", ())
    ]


def is_of_gpus(query: str) -> bool:
    """Whether only a machine with GPUs has an answer."""
    return "_gpu" in query
