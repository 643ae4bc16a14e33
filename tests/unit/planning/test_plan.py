"""Plans as a whole: machines, the table, what fits and what else would."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from piflow.commands.plan import Wanted, main
from piflow.config import Fp8TeacherConfig, load_recipe
from piflow.config.model import BaseWeights, TeacherLoRAConfig
from piflow.planning.choices import Fit, _runtimes, _smaller, fitting, sweep
from piflow.planning.hardware import Gpu, PlanError, gpu_by_hand, load_table
from piflow.planning.memory import (
    GIB,
    Placement,
    base_bytes,
    fits,
    keeping_codes,
    memory_of,
    weights_in_codes,
)
from piflow.planning.model import backbone_of, model_of
from piflow.planning.plan import Planner, on_machines
from piflow.planning.report import best, page
from piflow.planning.speed import Machines
from piflow.roles.base_weights import code_base
from tests.unit.planning.cases import recipe

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "pipelines" / "recipes"
TABLE = load_table()


def gpu(memory_gib: float, **changed: Any) -> Gpu:
    peaks = {"bfloat16": 100, "float32": 50}
    tree = {"bandwidth": 1000, "link": 100, "network_gbits": 100, "peaks": peaks, **changed}
    return Gpu.model_validate({"memory_mib": int(memory_gib * 1024), **tree})


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """Of a small FLUX whose activations are most of its memory."""
    folder = tmp_path_factory.mktemp("plan")
    training = {"batch_size": 512, "micro_batch_size": 32, "steps": 1000}
    return Planner(recipe(folder, "flux", training=training), TABLE)


def machines(memory_gib: float = 80, nodes: int = 1, each: int = 2, **changed: Any) -> Machines:
    return Machines("made-up", gpu(memory_gib, **changed), nodes, each)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("flux1-dev-gm-4nfe", 11_901_408_320),
        ("qwen-image-gm-4nfe", 20_430_401_088),
        ("z-image-gm-4nfe", 6_154_908_736),
        ("flux2-klein-base-4b-gm-4nfe", 3_875_544_576),
    ],
)
def test_parameters_of_the_published_models(name: str, parameters: int) -> None:
    wanted = load_recipe(RECIPES / f"{name}.yaml")
    backbone, source = backbone_of(wanted, published=True)
    model = model_of(wanted, backbone, source)
    assert model.parameters == parameters
    assert "published configuration (models/" in source and "isn't there" in source
    assert model.base_bytes == 2 * parameters
    if name.startswith("flux1"):
        # the paper's targets have 630,800,384; the output layer, 3072 -> 64, isn't adapted here
        assert model.trained - model.head == 630_800_384 - 256 * (3072 + 64)
    with pytest.raises(ValueError, match="config.json"):
        backbone_of(wanted)


def test_memory_is_the_sum_of_its_parts(planner: Planner) -> None:
    plan = planner.plan(machines())
    memory = plan.memory
    assert memory.total == sum(memory.parts().values())
    assert memory.lora + memory.heads == memory.ema == memory.gradients == 4 * planner.model.trained
    assert memory.optimizer == 2 * memory.ema
    assert plan.placement.strategy == "ddp" and plan.fits
    assert fits(memory, int(memory.own / 0.85) + 1) and not fits(memory, int(memory.own / 0.85) - 1)


def test_shards_hold_a_part_and_gradients_whole_until_a_steps_end(planner: Planner) -> None:
    wanted = on_machines(planner.recipe, 2, 4, strategy="fsdp", shard_size=4)
    passes = planner.passes(wanted)
    whole = memory_of(wanted, planner.model, passes, Placement("ddp", 8, 1))
    part = memory_of(wanted, planner.model, passes, Placement("fsdp", 8, 4))
    assert part.weights == -(-whole.weights // 4) and part.optimizer == -(-whole.optimizer // 4)
    assert part.gradients == whole.gradients, "two micro-batches and four segments add up"
    away = wanted.model_copy(
        update={"runtime": wanted.runtime.model_copy(update={"offload": "cpu"})}
    )
    offloaded = memory_of(away, planner.model, passes, Placement("fsdp", 8, 4))
    assert offloaded.weights == offloaded.optimizer == 0
    kept = part.weights + part.lora + part.heads + part.ema + part.optimizer
    assert offloaded.host == kept and offloaded.total == part.total - kept


def test_twice_the_machines_take_half_the_time(planner: Planner) -> None:
    one, two = (planner.plan(machines(nodes=nodes), usd=2.0) for nodes in (1, 2))
    assert two.speed.step == pytest.approx(one.speed.step / 2, rel=0.1)
    assert one.usd == pytest.approx(one.hours * 2 * 2.0)
    assert one.images_per_second == pytest.approx(512 / one.speed.step)
    slow = planner.plan(machines(peaks={"bfloat16": 1e-3, "float32": 5e-4}))
    flops = sum(n for kinds in slow.flops.values() for n in kinds.values()) / 2
    assert slow.speed.step == pytest.approx(flops / 5e8 / TABLE.efficiency.matmul, rel=0.3)


def test_the_cheapest_change_that_fits(planner: Planner) -> None:
    """Less kept where that is enough; then smaller micro-batches; then other GPUs."""
    alone = machines(each=1)

    def needed(samples: int, kind: str) -> float:
        training = planner.recipe.training.model_copy(update={"micro_batch_size": samples})
        wanted = planner.recipe.model_copy(update={"training": training})
        wanted = on_machines(wanted, 1, 1, activation_checkpointing=kind)
        return planner.plan(alone, recipe=wanted).memory.own / GIB / 0.85

    def found(memory: float) -> Fit:
        return fitting(planner, machines(TABLE.efficiency.context_gib + memory, each=1))

    whole, full, least = needed(32, "none"), needed(32, "full"), needed(1, "full")
    assert whole > 1.5 * full > 1.5 * 1.5 * least
    recomputed = found(0.9 * whole)
    assert not recomputed.fits and recomputed.change is not None
    assert any("activation_checkpointing" in key for key in recomputed.change.keys)
    assert recomputed.change.same_results and recomputed.change.plan.fits
    small = found(1.2 * least).change
    assert small is not None and not small.same_results
    assert any(key.startswith("training.micro_batch_size=1") for key in small.keys)
    assert "changes results" in str(small)
    other = found(0.01 * least).change
    assert other is not None and other.plan.machines.gpu_name in TABLE.gpus
    roomy = fitting(planner, machines())
    assert roomy.fits and roomy.change is None


def test_a_sweep_is_one_page(planner: Planner) -> None:
    gpus = {name: TABLE.gpus[name] for name in ("h100-80gb", "l4-24gb")}
    plans = sweep(planner, gpus, (1, 2, 4), 8)
    assert {plan.machines.nodes for plan in plans} == {1, 2}, "four need more micro-batches"
    assert {str(plan.placement) for plan in plans} == {"ddp", "fsdp", "hsdp(8)"}
    chosen = best(plans)
    assert len(chosen) == 4 and all(plan.fits for plan in chosen)
    html = page(plans[0], plans, TABLE)
    assert html.count("<circle") == 2, "GPUs without a price have no place in the picture"
    assert "assumed" in html and "Lambda, 2026-09-20" in html


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda r: on_machines(r, 0, 8), r"--nodes 0: expected a number from 1 to 10000"),
        (lambda r: on_machines(r, 1, -8), r"--gpus-per-node -8: expected a number from 1 to 64"),
        (lambda r: on_machines(r, 9, 8), r"72 workers, .* has work for 16; use at most 16 GPUs"),
        (
            lambda r: TABLE.gpu("h100"),
            r"'h100' isn't in the table, which has a100-40gb, .*--memory",
        ),
        (lambda r: gpu_by_hand(TABLE, "x", peak=5), r"--memory, --bandwidth are missing; give all"),
        (lambda r: gpu_by_hand(TABLE, "x", peak=-5.0), r"--peak -5: expected a number above 0"),
        (
            lambda r: main(r, Wanted("l4-24gb", price=-1)),
            r"--price -1: expected US dollars above 0",
        ),
        (lambda r: load_table("/nowhere.yaml"), r"--table /nowhere.yaml isn't a file"),
    ],
)
def test_mistakes_are_told_in_a_line(
    call: Callable[[Any], object], told: str, planner: Planner
) -> None:
    with pytest.raises(PlanError, match=told) as caught:
        call(planner.recipe)
    assert "\n" not in str(caught.value)


def test_a_gpu_by_hand() -> None:
    made = gpu_by_hand(TABLE, "x", memory_gb=10, peak=50, bandwidth=500)
    assert made.memory == 10 * GIB and made.peaks["float32"] == 25
    changed = gpu_by_hand(TABLE, "h100-80gb", bandwidth=1.0)
    assert changed == TABLE.gpus["h100-80gb"].model_copy(update={"bandwidth": 1.0})


def test_fp8_needs_a_gpu_that_has_it(planner: Planner) -> None:
    model = planner.recipe.model.model_copy(update={"fp8_teacher": Fp8TeacherConfig()})
    wanted = on_machines(planner.recipe.model_copy(update={"model": model}), 1, 2)
    with pytest.raises(PlanError, match="made-up has no peak for float8"):
        planner.plan(machines(), recipe=wanted)


def test_8_bit_weights_are_kept_where_they_fit(tmp_path: Path) -> None:
    """A byte a value of layers that see tokens, and a float32 a row; then no call makes them."""
    ours = Planner(recipe(tmp_path, "flux", model={"fp8_teacher": {}}), TABLE)
    width = 64
    rows_and_columns = [(width, width)] * 8 + [(4 * width, width), (width, 4 * width)] * 2
    double = sum(rows * columns + 4 * rows for rows, columns in rows_and_columns)
    rows_and_columns = [(width, width)] * 3 + [(4 * width, width), (width, 5 * width)]
    single = sum(rows * columns + 4 * rows for rows, columns in rows_and_columns)
    able = {"peaks": {"bfloat16": 100, "float32": 50, "float8": 200}}
    plan = ours.plan(machines(**able))
    assert plan.recipe.model.fp8_teacher == Fp8TeacherConfig(keep_weights=True)
    anew = ours.plan(machines(**able), recipe=keeping_codes(plan.recipe, False))
    assert plan.memory.fp8 - anew.memory.fp8 == 6 * double + 5 * single
    assert plan.speed.phases["teacher"].compute < anew.speed.phases["teacher"].compute
    replicas = on_machines(ours.recipe, 1, 2, strategy="ddp")
    small = ours.plan(machines(anew.memory.total / GIB, **able), recipe=replicas)
    assert not small.fits and small.memory == anew.memory


def test_a_teachers_lora_is_counted(tmp_path: Path) -> None:
    """Its weights in the base's dtype, and its products; that of the output layer is merged."""
    plain = recipe(tmp_path, "flux", model={"dtype": "bfloat16"})
    path = tmp_path / "lora.safetensors"
    backbone, _ = backbone_of(plain)
    tensors, values = {}, 0
    for name, layer in backbone.module.named_modules():
        if name.endswith((".to_q", "proj_mlp")) or name == "proj_out":
            out, into = layer.get_parameter("weight").shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.zeros(3, into)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.zeros(out, 3)
            values += 0 if name == "proj_out" else 3 * (into + out)
    save_file(tensors, path)
    lora = TeacherLoRAConfig(path=str(path))
    wanted = plain.model_copy(update={"model": plain.model.model_copy(update={"lora": lora})})
    with_it, without = (Planner(r, TABLE) for r in (wanted, plain))
    assert with_it.model.base_bytes - without.model.base_bytes == 2 * values > 0
    assert with_it.model.trained == without.model.trained
    more, less = (sum(p.passes(p.recipe).flops("teacher").values()) for p in (with_it, without))
    tokens = (32 // 4) ** 2  # of the picture, which all of these layers see
    assert more - less >= 2 * plain.training.micro_batch_size * tokens * values


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_base_in_codes_is_counted(kind: BaseWeights, tmp_path: Path) -> None:
    """To the byte what a model has saved that is put into codes."""
    plain = recipe(tmp_path, "flux", model={"dtype": "bfloat16"})
    changed = plain.model.model_copy(update={"base_weights": kind})
    wanted = plain.model_copy(update={"model": changed})
    backbone, source = backbone_of(plain)
    model = model_of(wanted, backbone, source)
    module = backbone.model_class.from_config(backbone.config).bfloat16()
    coded = code_base(
        module, backbone.block_classes, kind, lambda _, parameter: parameter, device="cpu"
    )
    assert len(weights_in_codes(wanted, model)) == coded.layers
    saved = base_bytes(plain, model) - base_bytes(wanted, model)
    assert saved == coded.before - coded.bytes > 0


def test_a_base_in_codes_is_offered(planner: Planner) -> None:
    """As a change of results, without shards; not where the recipe's other keys refuse it."""
    alone = machines(each=1)
    found = {change.keys: change for change in _smaller(planner, alone, None)}
    plain = next(c for keys, c in found.items() if keys == ("training.micro_batch_size=1",))
    for kind in ("int8", "nf4"):
        keys = (f"model.base_weights={kind}", "training.micro_batch_size=1")
        change = found[keys]
        assert not change.same_results and change.plan.placement.strategy == "single"
        plan = change.plan
        assert plan.memory.weights < plain.plan.memory.weights
        assert plan.memory.gathered > plain.plan.memory.gathered == 0
        assert plan.speed.step > plain.plan.speed.step
    replicas = _runtimes(plan.recipe, machines(each=2))
    assert {runtime["strategy"] for runtime in replicas} == {"ddp"}


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "efficiency: {matmul: 0.7, origin: measured by us}\n"
        "prices:\n  - {gpu: h100-80gb, provider: us, usd: 1.5, date: 2026-01-01, source: bill}\n"
    )
    table = load_table(path)
    price = table.price("h100-80gb")
    assert price is not None and price.usd == 1.5 and table.efficiency.attention == 0.45
    assert (table.efficiency.matmul, table.efficiency.origin) == (0.7, "measured by us")
    path.write_text("efficiency: {matmul: 7}\n")
    with pytest.raises(PlanError, match="efficiency.matmul: .* got 7"):
        load_table(path)
    path.write_text("gpu: {}\n")
    with pytest.raises(PlanError, match="gpu"):
        load_table(path)


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of docs/planning.md's example is within 2 % of what its command says today."""
    text = (ROOT / "docs" / "planning.md").read_text()
    rows = dict(re.findall(r"^\| `([\w. ]+)` \| ([^|]+) \|$", text, re.MULTILINE))
    assert len(rows) > 15
    wanted = load_recipe(RECIPES / "flux1-dev-gm-4nfe.yaml")
    main(wanted, Wanted("h100-80gb", nodes=1, gpus_per_node=8), in_json=True)
    tree = json.loads(capsys.readouterr().out)
    for key, shown in rows.items():
        value = tree["plan"]
        for part in key.split("."):
            value = value[part]
        if isinstance(value, str | bool) or key.startswith("model."):
            assert (f"{value:,}" if isinstance(value, int) else value) == shown.strip(), key
        else:
            assert value == pytest.approx(float(shown.replace(",", "")), rel=0.02), key
    assert tree["predicted"] and tree["efficiency"]["origin"] == "assumed"
