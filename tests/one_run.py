"""A run as piflow logs one, in its own process: URI RUN_DIR NAME MODEL; prints the run's id."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from piflow.commands.export import served_by_mlflow
from piflow.runs import tracking
from piflow.runs.registry import register_adapter
from piflow.runs.tracking import MlflowTracker, finish, start

STEPS = 50
_PATIENCE = 200.0  # seconds, for servers on loaded machines


def main(uri: str, run_dir: str, name: str, model: str) -> str:
    """Metrics, a picture, an event and a file; then an adapter of its own."""
    tracking._CLOSE_SECONDS = _PATIENCE
    folder = Path(run_dir)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "report.html").write_text(f"<p>é {name}")
    run_id = start(uri, "at once", name, {"name": name}, {})
    tracker = MlflowTracker(uri, run_id, run_dir)
    for step in range(1, STEPS + 1):
        tracker.log_metrics({"loss": 1 / step, "lr": 1e-4}, step)
    tracker.log_image(Image.new("RGB", (8, 8)), "samples", STEPS)
    tracker.event("checkpoint", f"step {STEPS}")
    tracker.log_artifact("evaluation/report.html")
    problem = tracker.close()
    if problem is not None:
        raise SystemExit(problem)
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "weights.safetensors").write_bytes(name.encode() * 100_000)
    register_adapter(uri, run_id, adapter, model, {}, "newest", served_by_mlflow([], name, STEPS))
    problem = finish(uri, run_id, run_dir)
    if problem is not None:
        raise SystemExit(problem)
    return run_id


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
