"""Prompts -> embedding store, with Ray Data.

::

    driver: read and dedupe prompts, lay out shards
       one item a shard --> encoder actors (min..max): encode, write the shard   (Ray Data)
    driver: <-- progress, then each shard's entry --> manifest.json, last

Prompts of one row group are encoded together, those of similar length in one call. An interrupted
job loses only unfinished shards: a file that is there and whole is kept. A finished store that
lacks the recipe's negative prompt gets it as one more file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from piflow import storage
from piflow.config import FluxEncoderConfig, Recipe, SD3EncoderConfig
from piflow.data.encoders import absolute_path, check_prompts, encoder_identity
from piflow.data.execution import quiet_context, remote_cause
from piflow.data.online import (
    encode_row_groups,
    load_encoder,
    recipe_prompts,
    small_recipe,
    store_layout,
)
from piflow.data.prompts import PromptSet
from piflow.data.store import (
    MANIFEST,
    Bucket,
    EmbeddingStore,
    EncodedPrompt,
    ShardEntry,
    ShardPlan,
    StoreError,
    StoreInputs,
    StoreManifest,
    TruncationReport,
    empty_prompt_plan,
    negative_prompt_plan,
    read_manifest,
    require_same_inputs,
    reusable_shard,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MUCH_MEMORY = 8e9  # bytes of float32 states that an encoder actor may hold without a word
JOB_FILE = "job.json"  # inputs of an unfinished store, so that a later job knows whose shards lie


@dataclass(frozen=True)
class _Job:
    """A checked recipe, laid out."""

    store: str
    inputs: StoreInputs
    buckets: tuple[Bucket, ...]
    shards: list[ShardPlan]
    empty: ShardPlan
    negative: ShardPlan | None  # of the recipe's guidance.negative_prompt, unless it is ""

    @property
    def plans(self) -> list[ShardPlan]:
        """All files."""
        return [*self.shards, self.empty, *([self.negative] if self.negative else [])]


@dataclass(frozen=True)
class _Finished:
    entry: ShardEntry
    truncated: TruncationReport


def main(recipe: Recipe, *, show_progress: bool = True) -> StoreManifest:
    """Encode the recipe's prompts and write the embedding store.

    A finished store of the same prompts, encoder and settings is kept as it is.

    Raises:
        FileNotFoundError: no prompts file or no encoder folder.
        ValueError: unusable prompts or encoder, or the store's folder belongs to other inputs.
        OSError: the storage refused.
    """
    console = Console(stderr=True, quiet=not show_progress)
    if recipe.embed.mode == "online":
        return prepare_online(recipe, show_progress=show_progress)
    prompts = recipe_prompts(recipe)
    if prompts.duplicates:
        _say(console, f"{prompts.duplicates} repeated prompt(s) are encoded once")
    job = _plan(recipe, prompts)
    finished = _finished_store(job)
    if finished is None:
        return _make_store(recipe, job, console)
    if job.negative is None or any(e.path == job.negative.path for e in finished.negative_prompts):
        _say(console, f"{job.store} is up to date, nothing to do")
        return finished
    _say(console, f"{job.store} is complete but for the negative prompt, which is added")
    manifest = _with_negative_prompt(recipe, job, job.negative, finished, console)
    write_manifest(job.store, manifest)
    return manifest


def prepare_online(
    recipe: Recipe, *, evaluation: bool = False, show_progress: bool = True
) -> StoreManifest:
    """Embed what an online run needs ahead: a small store, for guidance and a few pictures.

    Args:
        evaluation: whether of the evaluation prompts, or of those drawn along a run.

    Raises:
        as `main`.
    """
    prompts = recipe_prompts(recipe)
    check_prompts(recipe.encoder, (prompt.text for prompt in prompts.prompts))
    small, content = small_recipe(recipe, prompts, evaluation=evaluation)
    storage.write_bytes(small.embed.prompts, content)
    return main(small, show_progress=show_progress)


def verify(recipe: Recipe) -> None:
    """Read every file of the recipe's store and compare it with the manifest; print the result.

    Raises:
        StoreError: a file is missing, changed or damaged, another encoder wrote the store, or the
            recipe's negative prompt isn't in it.
    """
    if recipe.embed.mode == "online":
        recipe, _ = small_recipe(recipe, recipe_prompts(recipe), evaluation=False)
    store = EmbeddingStore.open(recipe.embed.store)
    store.require_encoder(encoder_identity(recipe.encoder))
    store.require_negative_prompt(recipe.guidance.negative_prompt)
    store.verify()
    size = sum(entry.bytes for entry in store.manifest.files) / 1e6
    print(
        f"{recipe.embed.store}: {store.manifest.num_rows} prompts in {len(store.manifest.files)} "
        f"files, {size:.1f} MB, all checksums match"
    )


def _plan(recipe: Recipe, prompts: PromptSet) -> _Job:
    negative = recipe.guidance.negative_prompt
    check_prompts(recipe.encoder, (prompt.text for prompt in prompts.prompts))
    check_prompts(recipe.encoder, [negative])
    layout = store_layout(recipe, prompts, encoder_identity(recipe.encoder))
    return _Job(
        store=storage.absolute(recipe.embed.store),
        inputs=layout.inputs,
        buckets=layout.buckets,
        shards=layout.shards,
        empty=empty_prompt_plan(),
        negative=negative_prompt_plan(negative) if negative else None,
    )


def _finished_store(job: _Job) -> StoreManifest | None:
    """The manifest, if all its files are there; a folder of other inputs is refused."""
    if storage.exists(storage.join(job.store, MANIFEST)):
        manifest = read_manifest(job.store)
        require_same_inputs(job.store, manifest.inputs, job.inputs)
        try:
            return EmbeddingStore.open(job.store).manifest
        except StoreError:
            return None  # files are missing: make them anew
    unfinished = storage.join(job.store, JOB_FILE)
    if storage.exists(unfinished):
        found = StoreInputs.model_validate_json(storage.read_bytes(unfinished))
        require_same_inputs(job.store, found, job.inputs)
    return None


def _make_store(recipe: Recipe, job: _Job, console: Console) -> StoreManifest:
    """Encode what isn't there yet, and write the manifest."""
    _warn_of_memory(recipe, job, console)
    storage.write_bytes(
        storage.join(job.store, JOB_FILE), job.inputs.model_dump_json(indent=1).encode()
    )
    done = _reusable(job)
    if done:
        _say(console, f"{len(done)} of {len(job.plans)} files are there already")
    done |= _encode(recipe, job, [plan for plan in job.plans if plan.path not in done], console)
    manifest = _to_manifest(job, done, _negative_prompts_of_others(job))
    write_manifest(job.store, manifest)
    storage.delete_file(storage.join(job.store, JOB_FILE))
    _warn_of_truncation(console, list(done.values()), job.inputs.encoder.max_tokens)
    return manifest


def _with_negative_prompt(
    recipe: Recipe, job: _Job, plan: ShardPlan, finished: StoreManifest, console: Console
) -> StoreManifest:
    done = _encode(recipe, job, [plan], console)
    _warn_of_truncation(console, list(done.values()), job.inputs.encoder.max_tokens)
    entries = (*finished.negative_prompts, done[plan.path].entry)
    return finished.model_copy(update={"negative_prompts": entries})


def _reusable(job: _Job) -> dict[str, _Finished]:
    found: dict[str, _Finished] = {}
    present = set(storage.list_files(job.store))
    for plan in job.plans:
        kept = reusable_shard(job.store, plan, job.inputs) if plan.path in present else None
        if kept is not None:
            found[plan.path] = _Finished(*kept)
    return found


def _encode(
    recipe: Recipe, job: _Job, missing: list[ShardPlan], console: Console
) -> dict[str, _Finished]:
    """Run the encoder actors over the missing shards, with a bar that counts prompts."""
    from piflow.runtime.driver import ray_session

    finished: dict[str, _Finished] = {}
    if not missing:
        return finished
    bar = Progress(
        TextColumn("embed: prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )
    with ray_session(recipe), bar:
        task = bar.add_task("embed", total=sum(len(plan.prompts) for plan in missing))
        for row in _run(recipe, job, missing):
            bar.advance(task, row["prompts"])
            if row["entry"]:
                entry = ShardEntry.model_validate_json(row["entry"])
                report = TruncationReport(row["truncated"], tuple(json.loads(row["examples"])))
                finished[entry.path] = _Finished(entry, report)
    return finished


def _run(recipe: Recipe, job: _Job, missing: list[ShardPlan]) -> Iterator[Mapping[str, Any]]:
    """Rows from the actors: progress, and one with an entry for each finished shard."""
    import ray.data

    embed = recipe.embed
    source = ray.data.from_items(
        [{"shard": number} for number in range(len(missing))], override_num_blocks=len(missing)
    )
    context = quiet_context(source)
    context.target_max_block_size = 1  # hand every progress row on at once
    plans = ray.put(missing)
    dataset = source.map_batches(
        EncodeShard,
        fn_constructor_args=(
            recipe.model_copy(update={"encoder": absolute_path(recipe.encoder)}),
            job.store,
            job.inputs,
            plans,
        ),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(embed.encoders[0], len(missing)),
            max_size=min(embed.encoders[1], len(missing)),
        ),
        num_cpus=1,
        num_gpus=embed.gpus_per_encoder,
    )
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayError as error:
        raise remote_cause(error) from error


class EncodeShard:
    """The encoder actor: encodes and writes whole shards, and tells how far it is."""

    def __init__(self, recipe: Recipe, store: str, inputs: StoreInputs, plans: Any) -> None:
        import ray

        self._encoder = load_encoder(recipe, inputs)
        self._encode = partial(self._encoder.encode_by_length, batch_size=recipe.embed.batch_size)
        self._store = store
        self._inputs = inputs
        self._plans: list[ShardPlan] = ray.get(plans)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, list[Any]]]:
        """Encode one shard: a progress row after each encoder call, then the shard's entry."""
        plan = self._plans[int(batch["shard"][0])]
        encoded: dict[int, EncodedPrompt] = {}
        for rows, results in encode_row_groups(plan, self._encode):
            encoded.update(zip(rows, results, strict=True))
            yield _row(prompts=len(rows))
        ordered = [encoded[row] for row in range(len(plan.prompts))]
        entry, report = write_shard(self._store, plan, ordered, self._inputs)
        yield _row(entry=entry.model_dump_json(), report=report)


def _row(
    prompts: int = 0, entry: str = "", report: TruncationReport | None = None
) -> dict[str, list[Any]]:
    return {
        "prompts": [prompts],
        "entry": [entry],
        "truncated": [report.count if report else 0],
        "examples": [json.dumps(report.examples if report else [])],
    }


def _negative_prompts_of_others(job: _Job) -> tuple[ShardEntry, ...]:
    """What a damaged store still has of other recipes' negative prompts."""
    if not storage.exists(storage.join(job.store, MANIFEST)):
        return ()
    own = job.negative.path if job.negative else None
    sizes = storage.file_sizes(job.store)
    return tuple(
        entry
        for entry in read_manifest(job.store).negative_prompts
        if entry.path != own and sizes.get(entry.path) == entry.bytes
    )


def _to_manifest(
    job: _Job, done: dict[str, _Finished], negative_prompts: tuple[ShardEntry, ...]
) -> StoreManifest:
    own = (done[job.negative.path].entry,) if job.negative else ()
    shards = [done[plan.path] for plan in job.shards]
    return StoreManifest(
        inputs=job.inputs,
        inputs_sha256=job.inputs.digest,
        buckets=job.buckets,
        shards=tuple(shard.entry for shard in shards),
        empty_prompt=done[job.empty.path].entry,
        truncated_prompts=sum(shard.truncated.count for shard in shards),
        negative_prompts=(*negative_prompts, *own),
    )


def _warn_of_memory(recipe: Recipe, job: _Job, console: Console) -> None:
    """Unpadded prompts are short; with all of T5's padding a prompt has 8 MB until it is stored."""
    config, encoder = recipe.encoder, job.inputs.encoder
    if not isinstance(config, FluxEncoderConfig | SD3EncoderConfig) or config.padding != "keep":
        return
    prompt = 4 * encoder.max_tokens * encoder.hidden_size
    largest = prompt * max(len(plan.prompts) for plan in job.plans)
    if largest > _MUCH_MEMORY:
        _say(
            console,
            f"warning: each encoder actor holds up to {largest / 1e9:.0f} GB of float32 states "
            f"({prompt / 1e6:.1f} MB a prompt with all padding); lower embed.rows_per_shard, e.g. "
            "to 256, and embed.rows_per_group to 16, or set encoder.padding = drop",
            style="yellow",
        )


def _warn_of_truncation(console: Console, finished: list[_Finished], max_tokens: int) -> None:
    count = sum(shard.truncated.count for shard in finished)
    if not count:
        return
    examples = [text for shard in finished for text in shard.truncated.examples][:3]
    quoted = "; ".join(repr(text if len(text) <= 60 else text[:59] + "…") for text in examples)
    _say(
        console,
        f"warning: {count} prompt(s) have more than {max_tokens} tokens and were truncated, "
        f"e.g. {quoted}; raise encoder.max_tokens to keep them whole",
        style="yellow",
    )


def _say(console: Console, text: str, style: str | None = None) -> None:
    """One line as it is: prompts and paths hold brackets, and logs are searched by line."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
