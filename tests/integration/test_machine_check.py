"""`piflow preflight` on two real workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piflow import cli

RECIPE = Path(__file__).parents[2] / cli.DEFAULT_RECIPE


def test_two_workers_measure_and_a_floor_that_isnt_reached_fails(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = [
        "--json",
        f"--set=run_dir={tmp_path}/run",
        "--set=runtime.num_workers=2",
        "--set=runtime.preflight.allreduce_gb_s=1e6",
    ]
    monkeypatch.setattr("sys.argv", ["piflow", "preflight", str(RECIPE), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert ended.value.code == 1 and "all-reduce" in told.err
    found = json.loads(told.out)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["ok"] is False
    assert [name for name, check in checks.items() if not check["ok"]] == ["all-reduce"]
    assert float(checks["all-reduce"]["found"].removesuffix(" GB/s")) > 0
    assert checks["devices"]["found"] == "2 x cpu on 1 machine(s)"
    assert "MB/s" in checks["storage"]["found"]
    assert checks["transport"]["found"] == "gloo over TCP"
    assert list((tmp_path / "run").iterdir()) == []
