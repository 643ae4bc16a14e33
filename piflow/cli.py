"""`piflow`: one command a pipeline. Recipes are validated before anything heavy is imported."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from piflow.config import Recipe, load_recipe
from piflow.config.model import GgufType
from piflow.runtime.exits import ExitCode, exit_code, is_ray_lost
from piflow.runtime.ray_job import require_lasting, require_lasting_paths
from piflow.runtime.signals import StoppedError, ended_by_signals
from piflow.storage.foreign import redacted, shown

app = typer.Typer(
    name="piflow",
    help="Distil text-to-image flow models into students that need 1-8 network evaluations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

DEFAULT_RECIPE = "pipelines/recipes/emoji-flux.yaml"
RecipeArgument = Annotated[Path, typer.Argument(help="recipe YAML file", metavar="RECIPE")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key; repeatable"),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
CheckpointOption = Annotated[
    str | None,
    typer.Option(help="checkpoint folder (URI); default: the run's newest", metavar="URI"),
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        help="adapter folder: a path, URI (hf://owner/name/folder) or repository on the hub",
        metavar="ADAPTER",
    ),
]
SubfolderOption = Annotated[
    str | None,
    typer.Option(help="the adapter's folder in that place", metavar="NAME"),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="the cluster's dashboard, http://host:8265; default: RAY_API_SERVER_ADDRESS, "
        "RAY_ADDRESS, or this machine's",
        metavar="URL",
    ),
]
FollowOption = Annotated[
    bool,
    typer.Option("--follow", "-f", help="print its log until it ends; Ctrl-C leaves it running"),
]
JobArgument = Annotated[
    str, typer.Argument(help="id, or the beginning of the ids of a run's jobs", metavar="JOB")
]


def _valid_alias(alias: str) -> str:
    from piflow.runs.registry import require_alias

    try:
        require_alias(alias)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return alias


AliasOption = Annotated[
    str,
    typer.Option(
        help="of the registered model, such as champion or staging; MLflow keeps latest and v1, "
        "v2, … for itself",
        metavar="NAME",
        callback=_valid_alias,
    ),
]

_LINE = 4000  # characters of a message's line that a terminal gets

_URI = re.compile(r"[A-Za-z][\w+.-]*:/[^\s'\"]+")

_EXTRAS = {  # package that an extra of piflow brings -> what to install
    "azure": "piflow[azure]",
    "boto3": "piflow[s3]",
    "botocore": "piflow[s3]",
    "deepspeed": "piflow[deepspeed]",
    "emoji": "piflow[demo]",
    "google": "piflow[gcs]",
    "mlflow": "piflow[mlflow]",
    "psutil": "piflow[mlflow]",
    "ray": "piflow[ray]",
    "torchao": "piflow[lowbit]",
}

_PACKAGES = {  # of a service that a recipe may name
    "aiohttp": "ray[default]",
    "requests": "ray[default]",
    "huggingface_hub": "huggingface_hub",
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "pymysql": "pymysql",
    "pyodbc": "pyodbc",
}


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    """The recipe of a command that keeps something.

    Raises:
        ValueError: a mistake in it, or this is a Ray job and its places end with the job.
    """
    config = load_recipe(recipe, overrides)
    require_lasting_paths(config)
    return config


@app.command(epilog=f"Example: `piflow embed {DEFAULT_RECIPE} --set embed.dtype=bf16`")
def embed(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="only check a finished store")] = False,
    quiet: QuietOption = False,
) -> None:
    """Encode prompts into an embedding store (Ray Data)."""
    config = _load(recipe, overrides)
    from piflow.commands import embed as pipeline

    if verify:
        pipeline.verify(config)
    else:
        pipeline.main(config, show_progress=not quiet)


@app.command(
    epilog=f"Example: `piflow check {DEFAULT_RECIPE}`. Needs what `piflow distill` needs: a store, "
    "or in online mode the prompts that `distill` embeds ahead. Exit code 0: every check passed."
)
def check(
    recipe: RecipeArgument,
    whole_base: Annotated[
        bool,
        typer.Option(
            "--whole-base",
            help="read all bytes of the base's weights, which takes minutes, and compare their "
            "hashes with the run's and the hub's; later starts on this machine compare them too",
        ),
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Check a recipe against its store, models and run folder; print what was found."""
    config = _load(recipe, overrides)
    from piflow.commands import check as pipeline

    pipeline.main(config, whole_base=whole_base)


@app.command(
    name="check-family",
    epilog="Example: `piflow check-family flux`, or `piflow check-family mypackage.model:FAMILY` "
    "with the package on PYTHONPATH. About a minute; needs no weights. Exit code 0: nothing is "
    "wrong. docs/bring-your-own-teacher.md says what a family is.",
)
def check_family(
    family: Annotated[
        str, typer.Argument(help="name, or module that holds a FAMILY; it is imported")
    ],
) -> None:
    """Check a family of models, ours or your own, on a tiny random model of it."""
    from piflow.commands import check_family as pipeline

    if not pipeline.main(family):
        raise typer.Exit(ExitCode.MISTAKE)


@app.command(
    epilog="Example: `piflow convert mine.safetensors models/mine/transformer --family flux`, then "
    "`model.path: models/mine/transformer` beside the family's VAE and text encoders."
)
def convert(
    file: Annotated[
        str, typer.Argument(help="the safetensors file: a path or URI (hf://owner/name/file)")
    ],
    folder: Annotated[str, typer.Argument(help="URI of an empty folder for config and weights")],
    family: Annotated[str, typer.Option(help="as a recipe's model.family")],
    config: Annotated[
        str | None,
        typer.Option(
            help="folder of a diffusers transformer of the same size, for its config.json; "
            "default: of the family's best known model",
            metavar="URI",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="of the weights that are written")
    ] = "bfloat16",
) -> None:
    """Write a teacher in one file, in its authors' or ComfyUI's layout, as a diffusers folder.

    8-bit weights with a scale are multiplied by it. Nothing but the file's numbers is used.
    """
    from piflow.commands import convert as pipeline

    pipeline.main(file, folder, family, config=config, dtype=dtype)


@app.command(
    epilog=f"Example: `piflow preflight {DEFAULT_RECIPE}`; on a cluster, set RAY_ADDRESS. Floors "
    "are the recipe's runtime.preflight. Exit code 0: everything passed; 1: something failed; 69: "
    "no room for the workers."
)
def preflight(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print what was found as JSON instead of a table")
    ] = False,
) -> None:
    """Try the machines that a recipe's workers run on: GPUs, network, storage and clocks.

    `piflow check` finds mistakes in the recipe itself, without machines.
    """
    config = _load(recipe, overrides)
    from piflow.commands import preflight as pipeline

    pipeline.main(config, as_json=as_json)


@app.command(epilog="Example: `piflow pretrain pipelines/recipes/emoji-teacher.yaml --set seed=1`")
def pretrain(
    recipe: RecipeArgument, overrides: SetOption = None, quiet: QuietOption = False
) -> None:
    """Train a small teacher by flow matching (Ray Train)."""
    config = _load(recipe, overrides)
    from piflow.commands import pretrain as pipeline

    pipeline.main(config, show_progress=not quiet)


@app.command(
    epilog=f"Example: `piflow distill {DEFAULT_RECIPE} --set training.optimizer.lr=1e-3`. "
    "Run it again to go on from the run's last checkpoint."
)
def distill(
    recipe: RecipeArgument, overrides: SetOption = None, quiet: QuietOption = False
) -> None:
    """Distil the teacher into a few-step student (Ray Train), or resume that."""
    config = _load(recipe, overrides)
    from piflow.commands import distill as pipeline

    pipeline.main(config, show_progress=not quiet)


@app.command(epilog=f"Example: `piflow evaluate {DEFAULT_RECIPE} --set evaluation.prompts=128`")
def evaluate(
    recipe: RecipeArgument,
    checkpoint: CheckpointOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="an adapter in place of the run's checkpoint, ours or a published one: its "
            "folder's path, URI (hf://owner/name/folder) or repository on the hub",
            metavar="URI",
        ),
    ] = None,
    subfolder: SubfolderOption = None,
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a checkpoint or adapter against the teacher; write a report and picture grids."""
    config = _load(recipe, overrides)
    if adapter is not None and checkpoint is not None:
        raise typer.BadParameter("expected --adapter or --checkpoint, not both")
    if adapter is None and subfolder is not None:
        raise typer.BadParameter("--subfolder is the adapter's: add --adapter")
    from piflow.commands import evaluate as pipeline

    if adapter is not None:
        pipeline.of_adapter(config, adapter, subfolder=subfolder, show_progress=not quiet)
        return
    pipeline.main(config, checkpoint=checkpoint, show_progress=not quiet)


@app.command(
    epilog="Example: `piflow compare runs/flux-a runs/flux-b s3://bucket/runs/flux-c`. Each was "
    "evaluated by `piflow evaluate`; exit code 1 where they have no prompt with the same noise in "
    "common, or other references."
)
def compare(
    places: Annotated[
        list[str],
        typer.Argument(
            help="folders of runs, of their evaluations (RUN_DIR/evaluation-…), or files of "
            "figures (RUN_DIR/evaluation/figures/step_….json); URIs",
            metavar="RUN_DIR",
        ),
    ],
    out: Annotated[str, typer.Option(help="the page", metavar="URI")] = "comparison.html",
) -> None:
    """Compare evaluated runs on one HTML page: figures, paired differences, pictures."""
    require_lasting({"--out": out})
    from piflow.commands import compare as pipeline

    pipeline.main(places, out=out)


@app.command(
    epilog=f"Example: `piflow export {DEFAULT_RECIPE} --dtype bfloat16`. docs/formats.md says what "
    "reads which format."
)
def export(
    recipe: RecipeArgument,
    checkpoint: CheckpointOption = None,
    format_: Annotated[
        Literal["adapter", "comfyui", "merged", "fp8", "gguf"],
        typer.Option(
            "--format",
            help="adapter: goes onto its base; comfyui: the same as one file for ComfyUI's nodes; "
            "merged: with all weights; fp8, gguf: merged, linear layers packed",
        ),
    ] = "adapter",
    out: Annotated[
        str | None, typer.Option(help="folder; default: RUN_DIR/FORMAT", metavar="URI")
    ] = None,
    weights: Annotated[
        Literal["ema", "student"], typer.Option(help="averaged or newest weights")
    ] = "ema",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="of the tensors")
    ] = "bfloat16",
    gguf_type: Annotated[GgufType, typer.Option(help="how gguf packs weights")] = "Q8_0",
    quality: Annotated[
        bool,
        typer.Option(
            help="whether a whole student's velocities are compared with the adapter's: four "
            "passes over the weights, on a GPU if there is one"
        ),
    ] = True,
    overrides: SetOption = None,
) -> None:
    """Write a checkpoint as an adapter, registered as an MLflow model version, or as a whole."""
    config = _load(recipe, overrides)
    if out is not None:
        require_lasting({"--out": out})
    from piflow.commands import export as pipeline

    if format_ == "adapter":
        pipeline.main(config, checkpoint=checkpoint, out=out, weights=weights, dtype=dtype)
        return
    if format_ == "comfyui":
        pipeline.comfyui(config, checkpoint=checkpoint, out=out, weights=weights, dtype=dtype)
        return
    pipeline.whole(
        config,
        format_,
        checkpoint=checkpoint,
        out=out,
        weights=weights,
        dtype=dtype,
        gguf_type=gguf_type,
        quality=quality,
    )


@app.command(
    epilog="Example: `piflow push runs/emoji-flux/adapter hf://owner/emoji-flux --dry-run`, then "
    "without it. The hub wants HF_TOKEN. docs/formats.md says what goes."
)
def push(
    source: Annotated[
        str, typer.Argument(help="folder that `piflow export` wrote", metavar="SOURCE")
    ],
    destination: Annotated[
        str,
        typer.Argument(
            help="hf://owner/name[/folder], s3://bucket/prefix, gs://… or abfs://…", metavar="DEST"
        ),
    ],
    run_dir: Annotated[
        str | None,
        typer.Option(
            "--run",
            help="the run's folder, for recipe, figures and pictures; default: the one around it",
            metavar="URI",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="of the base; default: as its card on the hub says"),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="make a new repository public; default: private")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list what would go, and its card; write nothing")
    ] = False,
) -> None:
    """Push an exported student with a model card to the hub or an object store."""
    from piflow.commands import push as pipeline

    pipeline.main(
        source, destination, run=run_dir, licence=licence, private=not public, dry_run=dry_run
    )


@app.command(
    epilog=f"Example: `piflow promote {DEFAULT_RECIPE} --dry-run`, then without it. Needs what "
    "`piflow evaluate` and `piflow export` leave in MLflow. Exit code 0: the alias is, or with "
    "--dry-run would be, the version's; 1: a gate doesn't hold, and nothing was moved. "
    "docs/registry.md explains gates."
)
def promote(
    recipe: RecipeArgument,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="of the registered model; default: the recipe's newest"),
    ] = None,
    alias: AliasOption = "champion",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="judge the gates and move nothing")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="move it though gates don't hold; its tags say so")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Move an alias of the registered model to a version, if the recipe's gates hold."""
    config = load_recipe(recipe, overrides)
    from piflow.commands import promote as pipeline

    pipeline.main(config, version=version, alias=alias, dry_run=dry_run, force=force)


@app.command(
    epilog=f"Example: `piflow rollback {DEFAULT_RECIPE}`. Again: one version further back."
)
def rollback(
    recipe: RecipeArgument, alias: AliasOption = "champion", overrides: SetOption = None
) -> None:
    """Move an alias back to the version that had it before the last `piflow promote`."""
    config = load_recipe(recipe, overrides)
    from piflow.commands import promote as pipeline

    pipeline.roll_back(config, alias=alias)


@app.command(
    epilog='Example: `piflow sample runs/emoji-flux/adapter --prompt "red heart" --prompt pizza '
    "--allow package://`, or `piflow sample Lakonik/pi-FLUX.1 --subfolder gmflux_k8_piid_4step "
    '--prompt "a red heart"`'
)
def sample(
    adapter: AdapterArgument,
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; repeatable")] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(help="prompts, in the formats that `piflow embed` reads", metavar="URI"),
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            help="picture to be edited, for students that edit: one for all prompts, or repeated "
            "for each",
            metavar="URI",
        ),
    ] = None,
    edit_column: Annotated[
        str | None,
        typer.Option(help="column of the prompts' file that holds the pictures to be edited"),
    ] = None,
    out: Annotated[str, typer.Option(help="folder for the pictures", metavar="URI")] = "samples",
    count: Annotated[
        int | None,
        typer.Option(min=1, help="pictures a prompt, with seeds that follow; default: 4"),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, help="seed of the first picture; several: exactly these"),
    ] = None,
    nfe: Annotated[
        int | None, typer.Option(min=1, help="network evaluations; default: as trained")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="pixels; default: as trained")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="pixels; default: as trained")] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="of a video, for students that make some; default: as trained"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 4,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one")
    ] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="what the base computes in; default: as in training"),
    ] = None,
    offload: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            help="keep the base in the host's memory, and a block at a time on the GPU; auto: "
            "where the GPU is too small"
        ),
    ] = "auto",
    base: Annotated[
        str | None,
        typer.Option(
            help="base model: a diffusers pipeline's folder, URI or name on the hub, or its "
            "transformer's folder; default: the adapter's",
            metavar="URI",
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="text encoder folder; default: the adapter's", metavar="URI")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="place that the adapter may name besides its own folder and bucket and the hub, "
            "with all below it; local folders that it knows by name are looked for there; "
            "repeatable",
            metavar="URI",
        ),
    ] = None,
    subfolder: SubfolderOption = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="more LoRA on the base, such as a style's: a safetensors file or folder, with "
            "@0.8 after it for another strength than 1; repeatable",
            metavar="URI[@STRENGTH]",
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="embedded guidance (FLUX); default: as trained")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(min=1e-3, max=1e3, help="time shift; default: as trained")
    ] = None,
    final_step_size_scale: Annotated[
        float | None,
        typer.Option(min=1e-3, max=1, help="last step's length; default: as trained, 0.5"),
    ] = None,
    total_substeps: Annotated[
        int | None, typer.Option(min=1, help="policy's substeps in all; default: as trained, 128")
    ] = None,
    substep_rounding: Annotated[
        Literal["nearest", "up"] | None,
        typer.Option(help="of a step's share of them; default: as trained, nearest"),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="module of a family that no installed package registers; is imported"),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Draw pictures, or videos, from an adapter, piflow's or a published one.

    Run it again to go on, or for more prompts.
    """
    require_lasting({"--out": out})
    from piflow.commands import sample as pipeline

    prompts = [*(prompt or [])]
    edits = pipeline.named_edits(edit or ())
    if edit_column is not None:
        if prompts_file is None or edits or prompts:
            raise typer.BadParameter(
                "expected --edit-column with --prompts-file, and without --prompt or --edit"
            )
        prompts, edits = pipeline.edits_of_file(prompts_file, edit_column)
    elif prompts_file is not None:
        prompts += pipeline.prompts_of_file(prompts_file)
    seeds = seed or [0]
    if len(seeds) > 1 and count is not None:
        raise typer.BadParameter("expected several --seed or a --count, not both")
    pipeline.main(
        adapter,
        prompts,
        edits=edits,
        out=out,
        seeds=seeds if len(seeds) > 1 else range(seeds[0], seeds[0] + (count or 4)),
        choices=pipeline.Choices(
            nfe,
            base,
            height,
            width,
            batch_size,
            device,
            dtype,
            offload,
            encoder=encoder,
            allowed=tuple(allow or ()),
            subfolder=subfolder,
            loras=tuple(lora or ()),
            guidance=guidance,
            shift=shift,
            final_step_size_scale=final_step_size_scale,
            total_substeps=total_substeps,
            substep_rounding=substep_rounding,
            frames=frames,
        ),
        family=family,
        show_progress=not quiet,
    )


@app.command(epilog="Example: `piflow demo --set training.steps=100`")
def demo(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")] = Path(DEFAULT_RECIPE),
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run embed, distill, evaluate, export and sample on the embedded default."""
    config = _load(recipe, overrides)
    from piflow.commands import demo as pipeline

    pipeline.main(config, show_progress=not quiet)


@app.command(
    epilog="Example: `piflow smoke pipelines/recipes/flux1-dev-gm-4nfe.yaml`. "
    "About a minute on two CPU cores; on a cluster, set RAY_ADDRESS and give --keep a folder that "
    "all machines share. Exit code 0: every part worked."
)
def smoke(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="new or empty folder for all files; default: a temporary one"),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="also stop and resume the run; a third of the time")
    ] = True,
    quiet: QuietOption = False,
) -> None:
    """Try a recipe and a cluster: every part, with a tiny random model and no downloads."""
    config = load_recipe(recipe, overrides)  # of which it uses no path
    if keep is not None:
        require_lasting({"--keep": keep})
    from piflow.commands import smoke as pipeline

    pipeline.main(config, keep=keep, resume=resume, show_progress=not quiet)


@app.command(
    epilog=f"Example: `piflow render {DEFAULT_RECIPE} --target kuberay --values my-values.yaml`. "
    "cluster/values.yaml is an example of values; docs/kubernetes.md and docs/machines.md say what "
    "to do with the files."
)
def render(
    recipe: RecipeArgument,
    target: Annotated[
        Literal["kuberay", "aws", "gcp", "on-premise", "slurm", "sky"],
        typer.Option(help="what the files are for"),
    ],
    values: Annotated[
        Path, typer.Option(help="image, machines and limits, as YAML", metavar="FILE")
    ] = Path("cluster/values.yaml"),
    out: Annotated[
        Path | None, typer.Option(help="folder; default: rendered/TARGET", metavar="FOLDER")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Write the files that run a recipe on a cluster; start nothing."""
    config = _load(recipe, overrides)
    from piflow.commands import render as pipeline

    pipeline.main(
        config,
        recipe.read_text(),
        target,
        values=values,
        out=out or Path("rendered") / target,
        overrides=overrides or [],
    )


@app.command(
    name="watch-spot",
    epilog="Example: `piflow watch-spot --cloud aws --address 10.0.0.5:6379`. `piflow render` has "
    "machines of a spot market start it; it ends when Ray knows that the machine goes.",
)
def watch_spot(
    cloud: Annotated[Literal["aws", "gcp"], typer.Option(help="whose machine this is")],
    address: Annotated[
        str,
        typer.Option(help="host:port of Ray's head, as given to `ray start`", metavar="ADDRESS"),
    ],
    on_rebalance: Annotated[
        Literal["tell", "drain"],
        typer.Option(help="when EC2 says that the machine is at elevated risk, without a time"),
    ] = "tell",
) -> None:
    """Wait for a cloud's notice that it takes this machine away, and have Ray drain it."""
    from piflow.runtime.spot import watch

    watch(
        cloud,
        address,
        drain_on_rebalance=on_rebalance == "drain",
        tell=lambda text: print(f"piflow watch-spot: {text}", flush=True),
    )


@app.command(
    epilog=f"Example: `piflow plan {DEFAULT_RECIPE} --gpu h100-80gb --nodes 1 --gpus-per-node 8`. "
    "No GPU and no weights are needed; docs/planning.md explains the figures. "
    "Exit code 0 also where it doesn't fit: the table says so, and --json has `fits`."
)
def plan(
    recipe: RecipeArgument,
    gpu: Annotated[
        str, typer.Option(help="kind of GPU, by its name in the table", metavar="NAME")
    ] = "h100-80gb",
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a machine")] = 8,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="compare strategies, GPUs and numbers of machines")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="with --sweep: an HTML page with the picture", metavar="FILE"),
    ] = None,
    in_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    price: Annotated[
        float | None, typer.Option(help="US dollars of a GPU, an hour; default: the table's")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="your own GPUs, efficiencies and prices, as YAML", metavar="FILE"),
    ] = None,
    memory: Annotated[float | None, typer.Option(help="of a GPU by hand, GiB")] = None,
    peak: Annotated[float | None, typer.Option(help="of a GPU by hand, bfloat16 TFLOP/s")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="of a GPU by hand, of its memory, GB/s")
    ] = None,
    link: Annotated[
        float | None, typer.Option(help="of a GPU by hand, to its neighbours, GB/s one way")
    ] = None,
    network: Annotated[
        float | None, typer.Option(help="of a machine to others, Gbit/s; default: the table's")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Predict a run's memory, time and cost on GPUs that nobody has rented yet."""
    config = load_recipe(recipe, overrides)
    if out is not None and not sweep:
        raise typer.BadParameter("--out is the page of a comparison: add --sweep")
    from piflow.commands import plan as pipeline

    wanted = pipeline.Wanted(
        gpu, nodes, gpus_per_node, memory, peak, bandwidth, link, network, price
    )
    pipeline.main(config, wanted, table_path=table, in_json=in_json, compare=sweep, out=out)


@app.command(
    epilog="Example: `piflow submit my-recipe.yaml --address http://127.0.0.1:8265 --follow`. "
    "Submit again to attach to the run's job, or to go on with a run whose job has ended. With "
    "--follow the exit code is the job's; docs/operations.md says which can be tried again."
)
def submit(
    recipe: RecipeArgument,
    address: AddressOption = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="of embed,distill,evaluate,export (or embed,pretrain); default: all that the "
            "recipe needs"
        ),
    ] = None,
    named: Annotated[
        list[Path] | None,
        typer.Option("--with", help="your own module, package or file that goes along; repeatable"),
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(
            help="values file of `piflow render`: the machines that an autoscaler may start, "
            "which the recipe is checked against",
            metavar="FILE",
        ),
    ] = None,
    wait_for_nodes: Annotated[
        bool,
        typer.Option(
            "--wait-for-nodes", help="submit though machines are missing: somebody will add them"
        ),
    ] = False,
    stop_seconds: Annotated[
        int, typer.Option(min=1, help="that the job gets to save its step when it is stopped")
    ] = 600,
    follow: FollowOption = False,
    overrides: SetOption = None,
) -> None:
    """Run a recipe's stages as a job on a Ray cluster; check both before anything is started."""
    config = load_recipe(recipe, overrides)
    from piflow.commands import submit as pipeline

    code = pipeline.main(
        config,
        address=address,
        stages=stages,
        named=named or [],
        values=values,
        wait_for_nodes=wait_for_nodes,
        stop_seconds=stop_seconds,
        follow=follow,
    )
    raise typer.Exit(code)


@app.command(epilog="Example: `piflow jobs --address http://127.0.0.1:8265`")
def jobs(address: AddressOption = None) -> None:
    """List the jobs that were submitted to a cluster."""
    from piflow.commands import jobs as pipeline

    pipeline.show(address)


@app.command(epilog="Example: `piflow logs emoji-flux-1a2b3c4d-1 --follow`")
def logs(job: JobArgument, address: AddressOption = None, follow: FollowOption = False) -> None:
    """Print what a submitted job prints."""
    from piflow.commands import jobs as pipeline

    raise typer.Exit(pipeline.logs(job, address, follow=follow))


@app.command(
    epilog="Example: `piflow stop emoji-flux-1a2b3c4d-1`. Submit the same recipe to go on."
)
def stop(job: JobArgument, address: AddressOption = None) -> None:
    """Have a submitted job save its step and end; say what was saved."""
    from piflow.commands import jobs as pipeline

    raise typer.Exit(pipeline.stop(job, address))


@app.command(name="recipe", epilog=f"Example: `piflow recipe {DEFAULT_RECIPE}`")
def show_recipe(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Print a recipe with every default filled in; a wrong one is explained."""
    sys.stdout.write(load_recipe(recipe, overrides).to_yaml())


def run(command: str) -> None:
    """One command as a program of its own: a script's options are the command's."""
    sys.argv.insert(1, command)
    main()


def main() -> None:
    """Console entry point: no mistake and no failure ends in a traceback on the terminal.

    The exit code says whether the same command can help, see `piflow.runtime.exits.ExitCode`; for
    what piflow didn't expect, the traceback lies in a file that the message names.
    """
    escape_logs()
    try:
        with ended_by_signals():
            app()
    except StoppedError as error:
        typer.secho(f"piflow: {error}", err=True, fg=typer.colors.YELLOW)
        _leave(error, exit_code(error))
    except Exception as error:
        message, code = _explained(error)
        lines = "\n".join(shown(line, _LINE) for line in message.splitlines())
        typer.secho(f"piflow: {lines}", err=True, fg=typer.colors.RED)
        _leave(error, code)


class _EscapedLines(logging.Formatter):
    """Warnings and the tracebacks behind them: what servers and files say is in both."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(shown(line, _LINE) for line in super().format(record).split("\n"))


def escape_logs() -> None:
    """Have Python's log of last resort, which is the terminal, show control characters escaped."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_EscapedLines())


def _leave(error: BaseException, code: ExitCode) -> NoReturn:
    """End the process, without Ray's client where it would wait for a cluster that is gone."""
    if is_ray_lost(error):
        from piflow.runtime.session import leave_lost_cluster

        leave_lost_cluster(code)
    raise SystemExit(code) from error


def _explained(error: Exception) -> tuple[str, ExitCode]:
    """What to tell of an error, and the exit code."""
    if missing := _missing_package(error):
        return missing, ExitCode.MISTAKE
    code = exit_code(error)
    if isinstance(error, ValueError):  # a library's or a worker's may be too short to act on
        return str(error) if _raised_here(error) else f"{error}\n{_kept_traceback(error)}", code
    if code is not ExitCode.UNEXPECTED:
        return str(error), code
    said = str(error).strip() or "no message"
    return f"{type(error).__name__}: {said}\n{_kept_traceback(error)}", code


def _missing_package(error: BaseException | None) -> str | None:
    """How to install the package whose absence is an error, or behind it.

    The errors behind one another may go in a circle: urllib3's do, where no server answers.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            name = error.name.partition(".")[0]
            wanted = _EXTRAS.get(name) or _PACKAGES.get(name)
            if wanted is not None:
                return f"the Python package {name} isn't installed: pip install '{wanted}'"
        error = error.__cause__ or error.__context__
    return None


def _raised_here(error: Exception) -> bool:
    """Whether piflow raised it itself, with a message for whoever runs it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _kept_traceback(error: Exception) -> str:
    """Write the traceback to a file; returns the line that names it, or the traceback itself."""
    text = "".join(traceback.format_exception(error))
    text = _URI.sub(lambda found: redacted(found[0]), text)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base, "piflow", f"failure-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
    except OSError as refused:
        return f"{text}\n(it couldn't be kept in a file: {refused})"
    return (
        f"The traceback is in {path}. Run the same command again if a service was away; otherwise "
        "report it with that file"
    )


if __name__ == "__main__":  # python -m piflow.cli
    main()
