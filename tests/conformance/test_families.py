"""Whole families, ours and the documentation's example; and adapters that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bria_family import FAMILY
from torch import Tensor

from piflow.backbones import Backbone, Conditioning
from piflow.commands import check_family
from piflow.testing.family import FAMILY_CHECKS, FamilyCheck, Skipped, TinyFamily, checks

FAMILIES = [
    "flux", "flux_kontext", "flux2", "flux2_klein", "qwen_image", "qwen_image_edit", "sd3",
    "z_image", "wan", "dit", "bria_family",
]  # fmt: skip

COMPARED = {
    "published_size": set(FAMILIES) - {"dit", "bria_family"},
    "same_picture_as_the_pipeline": set(FAMILIES) - {"dit"},
    "own_reference": set(),
}
"""Families for which a check must find what it compares with; all, where none are named."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return TinyFamily.made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("check", FAMILY_CHECKS, ids=[check.__name__ for check in FAMILY_CHECKS])
def test_it_holds(family: TinyFamily, check: FamilyCheck) -> None:
    try:
        check(family)
    except Skipped:
        assert family.name not in COMPARED.get(check.__name__, set(FAMILIES))


@pytest.mark.parametrize(
    ("name", "found_by", "told"),
    [
        ("SIGN", "same_picture_as_the_pipeline", "pipeline's picture"),
        ("SIGN_BY_HAND", "declared_sign", "minus the velocity"),
        ("TIME_BY_HAND", "declared_time", "past time_of"),
        ("TIME", "same_picture_as_the_pipeline", "pipeline's picture"),
        ("PATCHES", "same_picture_as_the_pipeline", "pipeline's picture"),
        ("DTYPE", "loaded_dtype", "dtype says torch.float32"),
        ("STORED", "empty_and_filled", "stored_output_names"),
        ("FIELDS", "both_heads", "in_channels"),
        ("TEXT", "every_input_counts", "the prompt changes nothing"),
    ],
)
def test_wrong_adapters_are_found(name: str, found_by: str, told: str, tmp_path: Path) -> None:
    made = TinyFamily.made(f"wrong_families:{name}", tmp_path)
    by_name = dict(checks(made))
    with pytest.raises((AssertionError, KeyError, ValueError), match=told):
        by_name[found_by]()


def test_the_command_tells_all_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(made: TinyFamily) -> list[tuple[str, Callable[[], None]]]:
        return [item for item in checks(made) if item[0] in ("names_and_config", "loaded_dtype")]

    monkeypatch.setattr("piflow.testing.family.checks", chosen)
    assert not check_family.main("wrong_families:DTYPE")
    told = " ".join(capsys.readouterr().out.split())
    assert "names and config │ right" in told and "WRONG: load in torch.bfloat16" in told
    assert check_family.main("bria_family")
    monkeypatch.setattr("wrong_families.BARE", replace(FAMILY, tiny=None), raising=False)
    with pytest.raises(ValueError, match="brings no tiny model"):
        check_family.main("wrong_families:BARE")


def test_a_family_may_bring_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TinyFamily.made("bria_family", tmp_path)
    own_reference = dict(checks(made))["own_reference"]

    def right(backbone: Backbone, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return backbone.unpack(backbone.output_tokens(x, sigma, cond), *x.shape[2:])

    monkeypatch.setattr("bria_family.tiny.reference", right, raising=False)
    own_reference()
    monkeypatch.setattr("bria_family.tiny.reference", lambda *inputs: -right(*inputs))
    with pytest.raises(AssertionError, match="the reference"):
        own_reference()
