"""Prompts -> embedding store, with Ray Data.

::

    driver: read and dedupe prompts, lay out shards
       one item a shard --> encoder actors (min..max): encode, write the shard   (Ray Data)
    driver: <-- progress, then each shard's entry --> manifest.json, last

An interrupted job loses only unfinished shards: a file that is there and whole is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from piflow import storage
from piflow.config import Recipe
from piflow.data.encoders import BertEncoder, encoder_identity
from piflow.data.execution import quiet_context, remote_cause
from piflow.data.prompts import PromptSet, read_prompts
from piflow.data.store import (
    MANIFEST,
    SCHEMA_VERSION,
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
    plan_store,
    read_manifest,
    require_same_inputs,
    reusable_shard,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

JOB_FILE = "job.json"  # inputs of an unfinished store, so that a later job knows whose shards lie


@dataclass(frozen=True)
class _Job:
    """A checked recipe, laid out."""

    store: str
    inputs: StoreInputs
    buckets: tuple[Bucket, ...]
    shards: list[ShardPlan]  # the empty prompt's file is the last


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
    from piflow.runtime.driver import ray_session

    console = Console(stderr=True, quiet=not show_progress)
    embed = recipe.embed
    prompts = read_prompts(
        embed.prompts, column=embed.prompt_column, height=embed.height, width=embed.width
    )
    if prompts.duplicates:
        _say(console, f"{prompts.duplicates} repeated prompt(s) are encoded once")
    job = _plan(recipe, prompts)
    finished = _finished_store(job)
    if finished is not None:
        _say(console, f"{job.store} is up to date, nothing to do")
        return finished
    storage.write_bytes(
        storage.join(job.store, JOB_FILE), job.inputs.model_dump_json(indent=1).encode()
    )
    done = _reusable(job)
    if done:
        _say(console, f"{len(done)} of {len(job.shards)} files are there already")
    missing = [plan for plan in job.shards if plan.path not in done]
    if missing:
        with ray_session(recipe):
            done |= _encode(recipe, job, missing, console)
    manifest = _to_manifest(job, done)
    write_manifest(job.store, manifest)
    storage.delete_file(storage.join(job.store, JOB_FILE))
    _warn_of_truncation(console, list(done.values()), recipe.encoder.max_tokens)
    return manifest


def verify(recipe: Recipe) -> None:
    """Read every file of the recipe's store and compare it with the manifest; print the result.

    Raises:
        StoreError: a file is missing, changed or damaged, or another encoder wrote the store.
    """
    store = EmbeddingStore.open(recipe.embed.store)
    store.require_encoder(encoder_identity(recipe.encoder.path, recipe.encoder.max_tokens))
    store.verify()
    size = sum(entry.bytes for entry in store.manifest.files) / 1e6
    print(
        f"{recipe.embed.store}: {store.manifest.num_rows} prompts in {len(store.manifest.files)} "
        f"files, {size:.1f} MB, all checksums match"
    )


def _plan(recipe: Recipe, prompts: PromptSet) -> _Job:
    embed = recipe.embed
    inputs = StoreInputs(
        schema_version=SCHEMA_VERSION,
        encoder=encoder_identity(recipe.encoder.path, recipe.encoder.max_tokens),
        dtype=embed.dtype,
        rows_per_shard=embed.rows_per_shard,
        rows_per_group=embed.rows_per_group,
        num_prompts=len(prompts.prompts),
        prompts_sha256=prompts.digest,
    )
    buckets, shards = plan_store(prompts.prompts, embed.rows_per_shard, embed.rows_per_group)
    return _Job(storage.absolute(embed.store), inputs, buckets, [*shards, empty_prompt_plan()])


def _finished_store(job: _Job) -> StoreManifest | None:
    """The manifest, if the store is complete; a folder of other inputs is refused."""
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


def _reusable(job: _Job) -> dict[str, _Finished]:
    found: dict[str, _Finished] = {}
    present = set(storage.list_files(job.store))
    for plan in job.shards:
        kept = reusable_shard(job.store, plan, job.inputs) if plan.path in present else None
        if kept is not None:
            found[plan.path] = _Finished(*kept)
    return found


def _encode(
    recipe: Recipe, job: _Job, missing: list[ShardPlan], console: Console
) -> dict[str, _Finished]:
    """Run the encoder actors over the missing shards, with a bar that counts prompts."""
    finished: dict[str, _Finished] = {}
    bar = Progress(
        TextColumn("embed: prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )
    with bar:
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
        fn_constructor_args=(recipe.model_dump(mode="json"), job.store, job.inputs, plans),
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

    def __init__(self, recipe: dict[str, Any], store: str, inputs: StoreInputs, plans: Any) -> None:
        import ray
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        config = Recipe.model_validate(recipe)
        device = "cuda" if config.embed.gpus_per_encoder else "cpu"
        self._encoder = BertEncoder(config.encoder.path, config.encoder.max_tokens, device)
        if self._encoder.identity != inputs.encoder:
            raise ValueError(
                f"the encoder {config.encoder.path} is {self._encoder.identity} on this node, but "
                f"{inputs.encoder} on the driver's; put the same files on all nodes"
            )
        self._batch_size = config.embed.batch_size
        self._store = store
        self._inputs = inputs
        self._plans: list[ShardPlan] = ray.get(plans)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, list[Any]]]:
        """Encode one shard: a progress row after each encoder call, then the shard's entry."""
        plan = self._plans[int(batch["shard"][0])]
        texts = [prompt.text for prompt in plan.prompts]
        encoded: dict[int, EncodedPrompt] = {}
        for rows, results in self._encoder.encode_by_length(texts, self._batch_size):
            encoded.update(zip(rows, results, strict=True))
            yield _row(prompts=len(rows))
        ordered = [encoded[row] for row in range(len(texts))]
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


def _to_manifest(job: _Job, done: dict[str, _Finished]) -> StoreManifest:
    *shards, empty = [done[plan.path] for plan in job.shards]
    return StoreManifest(
        inputs=job.inputs,
        inputs_sha256=job.inputs.digest,
        buckets=job.buckets,
        shards=tuple(shard.entry for shard in shards),
        empty_prompt=empty.entry,
        truncated_prompts=sum(shard.truncated.count for shard in shards),
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
