"""What a recipe leaves to memory is decided by the estimate, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from piflow.config import Recipe
from piflow.planning.memory import SAFE_SHARE, Placement, keeps_codes, memory_of
from piflow.planning.model import Model, backbone_of, model_of
from piflow.planning.passes import Passes, Passing
from piflow.planning.settling import CODES, WHOLE, is_open, resharding, settle, without_room
from tests.unit.planning.cases import recipe

FSDP, DDP = Placement("fsdp", 4, 4), Placement("ddp", 4, 1)
LOTS = 2**50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def counted(folder: Path) -> tuple[Model, Passes]:
    """Of a recipe with an fp8 teacher, which has what all others have."""
    wanted = made(folder, fp8={})
    backbone, source = backbone_of(wanted)
    model = model_of(wanted, backbone, source)
    return model, Passing(wanted, backbone).measure("none")


def made(folder: Path, fp8: dict[str, Any] | None = None, **runtime: Any) -> Recipe:
    return recipe(
        folder,
        "dit",
        model={"fp8_teacher": fp8},
        training={"batch_size": 8},
        runtime={"num_workers": 4, **runtime},
    )


def edge(wanted: Recipe, counted: tuple[Model, Passes], placement: Placement) -> int:
    """The least free memory that this fits."""
    return int(memory_of(wanted, *counted, placement).own / SAFE_SHARE) + 1


def test_blocks_stay_whole_where_they_fit(folder: Path, counted: tuple[Model, Passes]) -> None:
    wanted = made(folder)
    least = edge(resharding(wanted, False), counted, FSDP)
    assert least > edge(wanted, counted, FSDP)
    roomy, tight = (settle(wanted, *counted, FSDP, free) for free in (least, least - 2))
    assert roomy.recipe == resharding(wanted, False) and tight.recipe == resharding(wanted, True)
    (roomy_told,), (tight_told,) = roomy.reasons, tight.reasons
    assert roomy_told.startswith(f"{WHOLE} = false: ") and " fits in 85%" in roomy_told
    assert tight_told.startswith(f"{WHOLE} = true: ") and " doesn't fit in 85%" in tight_told


def test_what_is_decided_stays_so(folder: Path, counted: tuple[Model, Passes]) -> None:
    for reshard in (True, False):
        wanted = made(folder, reshard_after_forward=reshard, strategy="fsdp")
        assert not is_open(wanted, "fsdp") and settle(wanted, *counted, FSDP, 0).recipe == wanted
    replica = made(folder)
    assert not is_open(replica, "ddp")
    assert settle(replica, *counted, DDP, LOTS).recipe == replica, "FSDP's alone"


@pytest.mark.parametrize("placement", [FSDP, DDP])
def test_8_bit_weights_are_kept_where_they_fit(
    placement: Placement, folder: Path, counted: tuple[Model, Passes]
) -> None:
    """Under FSDP in place of whole blocks: the teacher's rows are gathered in 8 bits."""
    wanted = made(folder, fp8={})
    kept = made(folder, fp8={"keep_weights": True})
    least = edge(kept, counted, placement)
    roomy, tight = (settle(wanted, *counted, placement, free) for free in (least, least - 2))
    assert keeps_codes(roomy.recipe) and not keeps_codes(tight.recipe)
    assert tight.recipe.model.fp8_teacher is not None
    assert tight.recipe.model.fp8_teacher.keep_weights is False
    assert roomy.reasons[-1].startswith(f"{CODES} = true: ")
    sharded = placement is FSDP
    assert (len(roomy.reasons), len(tight.reasons)) == (1 + sharded, 1 + sharded)
    assert roomy.recipe.runtime.reshard_after_forward is (True if sharded else None)


def test_a_teacher_whose_weights_are_made_anew_may_have_whole_blocks(
    folder: Path, counted: tuple[Model, Passes]
) -> None:
    found = settle(made(folder, fp8={"keep_weights": False}), *counted, FSDP, LOTS)
    assert found.recipe.runtime.reshard_after_forward is False and len(found.reasons) == 1


def test_without_an_estimate_the_least_is_taken(folder: Path) -> None:
    found = without_room(made(folder, fp8={}), "fsdp", "unknown")
    assert found.recipe.runtime.reshard_after_forward is True and not keeps_codes(found.recipe)
    assert found.reasons == (f"{WHOLE} = true: unknown", f"{CODES} = false: unknown")
    assert not without_room(made(folder), "ddp", "unknown").reasons
