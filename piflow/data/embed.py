"""Prompts -> embedding store, with Ray Data.

::

    driver: read and dedupe prompts, lay out shards
       one item a shard --> encoder actors (min..max): encode, write the shard   (Ray Data)
                        pictures first: prompts whose picture is bad are left out, or end the job
    driver: <-- progress, then each shard's entry --> manifest.json, last

Prompts of one row group are encoded together, those of similar length in one call. While an
encoder's finished shard is rounded and written, the actor encodes the next one. An interrupted
job loses only unfinished shards: a file that is there and whole is kept. A finished store that
lacks the recipe's negative prompt gets it as one more file.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from piflow import storage
from piflow.backbones.codec import Codec, absolute_paths, build_codec, check_channels
from piflow.backbones.encoders import encoder_identity
from piflow.backbones.text import EncodedPrompt
from piflow.config import Recipe
from piflow.data.background import quiet_context
from piflow.data.cluster import require_resources
from piflow.data.encode import (
    encode_row_groups,
    load_encoder,
    on_encoders,
    what_failed,
)
from piflow.data.layout import (
    Layout,
    ShardPlan,
    empty_prompt_plan,
    negative_prompt_plan,
    plan_store,
    recipe_prompts,
    require_recipes_prompts,
    store_layout,
)
from piflow.data.manifest import (
    MANIFEST,
    Bucket,
    LatentInputs,
    ShardEntry,
    SkippedPicture,
    StoreError,
    StoreInputs,
    StoreManifest,
    expected_version,
    read_inputs,
    read_manifest,
    require_same_inputs,
    write_manifest,
)
from piflow.data.online import small_recipe
from piflow.data.pictures import (
    ConditionEncoder,
    LatentEncoder,
    PictureReader,
    codec_identity,
    condition_inputs,
    with_condition_sizes,
)
from piflow.data.prompts import Prompt, PromptSet
from piflow.data.reader import EmbeddingStore
from piflow.data.shared_disk import WRITER_FILE, one_writer, require_shared, require_visible
from piflow.data.writer import ShardReport, reusable_shard, write_shard
from piflow.progress import PlainConsole, progress
from piflow.runs.lease import PROCESS, Ownership
from piflow.storage.foreign import shown
from piflow.storage.picture import BadPictureError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


Session = Callable[[Recipe], AbstractContextManager[None]]
"""recipe -> a block in which Ray runs, with room for the recipe's actors."""

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
    prompts: tuple[Prompt, ...] = ()  # in the order of their files

    @property
    def plans(self) -> list[ShardPlan]:
        """All files."""
        return [*self.shards, self.empty, *([self.negative] if self.negative else [])]


@dataclass(frozen=True)
class _Work:
    """When an encoder actor was at a shard, by its clock, and for how many seconds it encoded."""

    actor: str
    begin: float
    end: float
    busy: float


@dataclass(frozen=True)
class _Finished:
    entry: ShardEntry
    report: ShardReport
    work: _Work | None = None  # None: an earlier job made it


def embed_prompts(recipe: Recipe, session: Session, *, show_progress: bool = True) -> StoreManifest:
    """Encode the recipe's prompts and write the embedding store.

    A finished store of the same prompts, encoder and settings is kept as it is.

    Args:
        session: opens Ray for the time that actors encode; a finished store needs none.

    Raises:
        FileNotFoundError: no prompts file or no encoder folder.
        ValueError: unusable prompts or encoder, bad pictures, the store's folder belongs to other
            inputs, another job writes it, or not all machines see it.
        ResourcesError: the cluster has no room for an encoder.
        EncoderDiedError: an encoder's process died again and again at a shard.
        OSError: the storage refused.
    """
    console = PlainConsole(stderr=True, quiet=not show_progress)
    if recipe.embed.mode == "online":
        return prepare_online(recipe, session, show_progress=show_progress)
    prompts = recipe_prompts(recipe)
    _require_sizes(recipe, prompts)
    if prompts.duplicates:
        _say(console, f"{prompts.duplicates} repeated prompt(s) are encoded once")
    job = _plan(recipe, prompts)
    finished = _up_to_date(recipe, job, console)
    if finished is not None:
        return finished
    with one_writer(job.store) as ownership:
        finished = _up_to_date(recipe, job, console)  # another job may have finished it meanwhile
        if finished is not None:
            return finished
        return _write(recipe, job, session, console, ownership)


def _up_to_date(recipe: Recipe, job: _Job, console: PlainConsole) -> StoreManifest | None:
    """The manifest of a store that lacks nothing; None: there is something to do."""
    finished = _finished_store(job)
    if finished is None:
        return None
    _require_wanted(recipe, finished)
    if job.negative is not None and not _has(finished, job.negative):
        return None
    _say(console, f"{job.store} is up to date, nothing to do")
    _tell_of_pictures(console, finished)
    return finished


def _has(manifest: StoreManifest, negative: ShardPlan) -> bool:
    return any(entry.path == negative.path for entry in manifest.negative_prompts)


def _write(
    recipe: Recipe, job: _Job, session: Session, console: PlainConsole, ownership: Ownership
) -> StoreManifest:
    """Make the store, or add the recipe's negative prompt to a finished one."""
    finished = _finished_store(job)
    if finished is None:
        sized = _with_condition_sizes(recipe, job, console)
        return _make_store(recipe, sized, session, console, ownership)
    if job.negative is None or _has(finished, job.negative):
        return finished
    _say(console, f"{job.store} is complete but for the negative prompt, which is added")
    manifest = _with_negative_prompt(recipe, job, job.negative, finished, session, console)
    _finish(job.store, manifest, ownership)
    return manifest


def _finish(store: str, manifest: StoreManifest, ownership: Ownership) -> None:
    """Write the manifest, once all its files are seen from here.

    Raises:
        StoreError: a file that an encoder wrote isn't there, or has another size.
        RunTakenError: another job has taken the store over.
    """
    sizes = storage.file_sizes(store)
    for entry in manifest.files:
        if sizes.get(entry.path) != entry.bytes:
            found = "isn't there" if entry.path not in sizes else f"has {sizes[entry.path]} bytes"
            raise StoreError(
                f"an encoder wrote {entry.path} with {entry.bytes} bytes to {store}, and seen from "
                f"here it {found}: put the store on a disk that all machines mount under this "
                "path, or on s3://…, and run `piflow embed` again"
            )
    ownership.require()
    write_manifest(store, manifest)


def prepare_online(
    recipe: Recipe, session: Session, *, evaluation: bool = False, show_progress: bool = True
) -> StoreManifest:
    """Embed what an online run needs ahead: a small store, for guidance and a few pictures.

    Args:
        evaluation: whether of the evaluation prompts, or of those drawn along a run.

    Raises:
        as `embed_prompts`.
    """
    prompts = recipe_prompts(recipe)
    _require_sizes(recipe, prompts)
    for prompt in prompts.prompts:
        recipe.encoder.check_prompt(prompt.text)
    small, content = small_recipe(recipe, prompts, evaluation=evaluation)
    storage.write_bytes(small.embed.prompts, content)
    return embed_prompts(small, session, show_progress=show_progress)


def verify(recipe: Recipe) -> None:
    """Read every file of the recipe's store and compare it with the manifest; print the result.

    Raises:
        StoreError: a file is missing, changed or damaged, the store is of other prompts, another
            encoder or VAE wrote it, or it lacks the recipe's negative prompt, or prompts whose
            pictures were bad.
    """
    if recipe.embed.mode == "online":
        recipe, _ = small_recipe(recipe, recipe_prompts(recipe), evaluation=False)
    store = EmbeddingStore.open(recipe.embed.store)
    require_recipes_prompts(recipe, recipe.embed.store, store.manifest.inputs)
    _require_wanted(recipe, store.manifest)
    store.require_encoder(encoder_identity(recipe.encoder))
    store.require_negative_prompt(recipe.guidance.negative_prompt)
    if recipe.embed.image_column is not None:
        store.require_latents(codec_identity(recipe.model, recipe.embed))
    store.require_conditions(condition_inputs(recipe))
    store.verify()
    manifest = store.manifest
    has_pictures = manifest.inputs.latents is not None or manifest.inputs.conditions is not None
    pictures = " with latents of their pictures" if has_pictures else ""
    size = sum(entry.bytes for entry in manifest.files) / 1e6
    print(
        f"{recipe.embed.store}: {manifest.num_rows} prompts{pictures} in {len(manifest.files)} "
        f"files, {size:.1f} MB, all checksums match"
    )


def _plan(recipe: Recipe, prompts: PromptSet) -> _Job:
    negative = recipe.guidance.negative_prompt
    for text in (*(prompt.text for prompt in prompts.prompts), negative):
        recipe.encoder.check_prompt(text)
    layout = store_layout(recipe, prompts, encoder_identity(recipe.encoder))
    if recipe.embed.stores_pictures:
        layout = _with_pictures(recipe, layout)
    return _Job(
        store=storage.absolute(recipe.embed.store),
        inputs=layout.inputs,
        buckets=layout.buckets,
        shards=layout.shards,
        empty=empty_prompt_plan(),
        negative=(
            negative_prompt_plan(negative)
            if negative and layout.inputs.negative_prompt is None
            else None
        ),
        prompts=prompts.prompts,
    )


def _require_sizes(recipe: Recipe, prompts: PromptSet) -> None:
    """Check that the model's codec takes all pictures' sizes, where this machine has the model.

    Raises:
        ValueError: names a size and the first prompt of it.
    """
    try:
        codec = build_codec(recipe.model)
    except OSError:  # the text encoder may be all that this machine has, or may read
        return
    sizes = {(recipe.embed.height, recipe.embed.width): "embed.height and embed.width"}
    for height, width in recipe.embed.condition_sizes:
        sizes.setdefault((height, width), "embed.condition_sizes")
    for prompt in prompts.prompts:
        if (prompt.height, prompt.width) not in sizes:
            sizes[prompt.height, prompt.width] = f"prompt {shown(repr(prompt.text))}"
    for (height, width), source in sizes.items():
        try:
            codec.latent_shape(height, width)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def _with_pictures(recipe: Recipe, layout: Layout) -> Layout:
    """The same prompts in the same places, with latents of their pictures of either kind.

    Raises:
        ValueError: no VAE, one whose latents the model doesn't take, or picture sizes that it
            doesn't take.
    """
    codec = build_codec(recipe.model)
    with suppress(FileNotFoundError):  # encoder and VAE may be all that this machine has
        check_channels(recipe.model, codec)
    latents = None
    if recipe.embed.image_column is not None:
        latents = LatentInputs(
            codec=codec_identity(recipe.model, recipe.embed), dtype=recipe.embed.latent_dtype
        )
    conditions = condition_inputs(recipe)
    negative = recipe.guidance.negative_prompt if recipe.encoder.reads_pictures else None
    update = {
        "schema_version": expected_version(latents, conditions, negative),
        "latents": latents,
        "conditions": conditions,
        "negative_prompt": negative,
    }
    inputs = layout.inputs.model_copy(update=update)
    return Layout(inputs, _with_shapes(codec, inputs, layout.buckets), layout.shards)


def _with_shapes(
    codec: Codec, inputs: StoreInputs, buckets: Sequence[Bucket]
) -> tuple[Bucket, ...]:
    """Buckets with the shapes of their pictures' latents, as far as their sizes are known."""
    sized = []
    for bucket in buckets:
        shapes: dict[str, Any] = {}
        if inputs.latents is not None:
            shapes["latent_shape"] = codec.latent_shape(bucket.height, bucket.width)
        if bucket.condition_size is not None:
            shapes["condition_shape"] = codec.latent_shape(*bucket.condition_size)
        sized.append(bucket.model_copy(update=shapes))
    return tuple(sized)


def _with_condition_sizes(recipe: Recipe, job: _Job, console: PlainConsole) -> _Job:
    """The job laid out by the sizes of the pictures to be edited as well, which are looked at.

    Raises:
        BadPictureError, ValueError, OSError: as `with_condition_sizes`.
    """
    if job.inputs.conditions is None:
        return job
    _say(console, f"looking at the sizes of {len(job.prompts)} prompts' pictures to be edited")
    prompts = with_condition_sizes(recipe, job.prompts)
    embed = recipe.embed
    buckets, shards = plan_store(prompts, embed.rows_per_shard, embed.rows_per_group)
    shaped = _with_shapes(build_codec(recipe.model), job.inputs, buckets)
    return replace(job, buckets=shaped, shards=shards)


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
        require_same_inputs(job.store, read_inputs(unfinished), job.inputs)
    return None


def _make_store(
    recipe: Recipe, job: _Job, session: Session, console: PlainConsole, ownership: Ownership
) -> StoreManifest:
    """Encode what isn't there yet, and write the manifest."""
    _warn_of_memory(recipe, job, console)
    storage.write_bytes(
        storage.join(job.store, JOB_FILE), job.inputs.model_dump_json(indent=1).encode()
    )
    done = _reusable(job, _bad_share(recipe))
    if done:
        _say(console, f"{len(done)} of {len(job.plans)} files are there already")
    missing = [plan for plan in job.plans if plan.path not in done]
    with closing(_encode(recipe, job, missing, session, console)) as shards:
        for shard in shards:
            done[shard.entry.path] = shard
            _require_few_skipped(recipe, job, done)
    manifest = _to_manifest(job, done, _negative_prompts_of_others(job))
    _finish(job.store, manifest, ownership)
    storage.delete_file(storage.join(job.store, JOB_FILE))
    _warn_of_truncation(console, list(done.values()), job.inputs.encoder.max_tokens)
    _tell_of_pictures(console, manifest)
    _tell_of_idleness(console, list(done.values()))
    _say(
        console,
        f"{job.store}: the prompts' embeddings take {manifest.times_smaller:.1f} times less than "
        "padded to 512 tokens in fp8",
    )
    return manifest


def _with_negative_prompt(
    recipe: Recipe,
    job: _Job,
    plan: ShardPlan,
    finished: StoreManifest,
    session: Session,
    console: PlainConsole,
) -> StoreManifest:
    [done] = _encode(recipe, job, [plan], session, console)
    _warn_of_truncation(console, [done], job.inputs.encoder.max_tokens)
    entries = (*finished.negative_prompts, done.entry)
    return finished.model_copy(update={"negative_prompts": entries})


def _reusable(job: _Job, bad_share: float) -> dict[str, _Finished]:
    """Shards that an earlier job left, but those that left more out than is allowed on the whole.

    What was wrong with so many pictures may have been put right since.
    """
    found: dict[str, _Finished] = {}
    present = set(storage.list_files(job.store))
    for plan in job.plans:
        kept = (
            reusable_shard(job.store, plan, job.inputs, job.buckets)
            if plan.path in present
            else None
        )
        if kept is not None and len(kept[1].skipped) <= bad_share * len(plan.prompts):
            found[plan.path] = _Finished(*kept)
    return found


def _bad_share(recipe: Recipe) -> float:
    """How many of the prompts may be left out for their pictures."""
    return recipe.embed.max_bad_pictures if recipe.embed.bad_pictures == "skip" else 0.0


def _require_few_skipped(recipe: Recipe, job: _Job, done: Mapping[str, _Finished]) -> None:
    """Check the share of bad pictures as soon as they are known.

    Raises:
        BadPictureError: names one, and what to do.
    """
    skipped = [picture for shard in done.values() for picture in shard.report.skipped]
    if len(skipped) > _bad_share(recipe) * job.inputs.num_prompts:
        raise BadPictureError(
            f"{len(skipped)} of {job.inputs.num_prompts} prompts' pictures can't be used so far, "
            f"more than embed.max_bad_pictures = {recipe.embed.max_bad_pictures} allows, e.g. "
            f"{_example(skipped[0])}; check embed.image_column or condition_column and the "
            "pictures' place, or raise embed.max_bad_pictures"
        )


def _require_wanted(recipe: Recipe, manifest: StoreManifest) -> None:
    """Check that a finished store lacks no prompt, if bad pictures are to stop the job.

    Raises:
        StoreError: says how many it lacks, and why the first.
    """
    skipped = manifest.skipped_pictures
    if skipped and recipe.embed.bad_pictures == "stop":
        raise StoreError(
            f"embedding store {recipe.embed.store} was made with embed.bad_pictures = skip and "
            f"lacks {len(skipped)} prompt(s), the first for picture "
            f"{_example(skipped[0])}; set embed.bad_pictures = skip to use it as it is. Or repair "
            f"the pictures, delete {MANIFEST} there and run `piflow embed` again: only files that "
            "lack prompts are made anew"
        )


def _encode(
    recipe: Recipe, job: _Job, missing: list[ShardPlan], session: Session, console: PlainConsole
) -> Generator[_Finished]:
    """Run the encoder actors over the missing shards, and show how many prompts are done."""
    if not missing:
        return
    total = sum(len(plan.prompts) for plan in missing)
    with session(recipe), progress("embed: prompts", total, console=console) as bar:
        require_resources(
            [{"CPU": 1, "GPU": recipe.embed.gpus_per_encoder}],
            what="an encoder",
            keys="embed.gpus_per_encoder",
            timeout=recipe.runtime.worker_start_timeout,
        )
        for row in _run(recipe, job, missing):
            bar.advance(row["prompts"])
            if row["entry"]:
                yield _Finished(
                    ShardEntry.model_validate_json(row["entry"]),
                    ShardReport.of_json(row["report"]),
                    _Work(**json.loads(row["work"])),
                )


def _for_actors(recipe: Recipe) -> Recipe:
    """The recipe with places that mean the same in another working directory."""
    prompts = storage.absolute(recipe.embed.prompts)
    changes = {
        "encoder": recipe.encoder.absolute(),
        "model": absolute_paths(recipe.model),
        "embed": recipe.embed.model_copy(update={"prompts": prompts}),
    }
    return recipe.model_copy(update=changes)


def _run(recipe: Recipe, job: _Job, missing: list[ShardPlan]) -> Iterator[Mapping[str, Any]]:
    """Rows from the actors: progress, and one with an entry for each finished shard."""
    import ray.data

    embed = recipe.embed
    source = ray.data.from_items(
        [{"shard": number} for number in range(len(missing))], override_num_blocks=len(missing)
    )
    context = quiet_context(source)
    context.target_max_block_size = 1  # hand every progress row on at once
    actors = ray.data.ActorPoolStrategy(
        min_size=min(embed.encoders[0], len(missing)),
        max_size=min(embed.encoders[1], len(missing)),
        max_concurrent_calls_per_actor=2,  # one encodes while the other one writes
        enable_true_multi_threading=True,
    )
    arguments = (_for_actors(recipe), job.store, job.inputs, ray.put(missing), PROCESS)
    dataset = on_encoders(source, EncodeShard, arguments, embed, actors)
    begun: set[str] = set()
    try:
        for row in dataset.iter_rows():
            if row["begun"]:
                begun.add(row["begun"])
            if row["entry"]:
                begun.discard(ShardEntry.model_validate_json(row["entry"]).path)
            yield row
    except ray.exceptions.RayError as error:
        where = f"at {', '.join(sorted(begun))}" if begun else "before its first shard"
        then = "Run `piflow embed` again: finished shards are kept"
        raise what_failed(error, embed, where, then) from error


def picture_reader(recipe: Recipe) -> PictureReader | None:
    """What reads pictures for the recipe's text encoder; None: it reads prompts alone."""
    sizes = recipe.condition_sizes
    if sizes is None or not recipe.encoder.reads_pictures:
        return None
    return PictureReader(recipe.embed, recipe.encoder.picture_sizes(sizes))


class EncodeShard:
    """The encoder actor: encodes and writes whole shards, and tells how far it is.

    Two threads call it; one shard is encoded at a time.

    Args:
        recipe: with absolute paths.
        store: the store's URI.
        inputs: the store's.
        plans: Ray's reference to what goes into each shard.
        writer: what the driver that owns the store calls itself.
    """

    _picture: PictureReader | None = None  # of an encoder that reads pictures as well

    def __init__(
        self, recipe: Recipe, store: str, inputs: StoreInputs, plans: Any, writer: str
    ) -> None:
        import ray

        self._encoder = load_encoder(recipe, inputs)
        self._encode = partial(self._encoder.encode_by_length, batch_size=recipe.embed.batch_size)
        self._picture = picture_reader(recipe)
        if self._picture is not None:
            self._encode = partial(self._encode, negative=recipe.guidance.negative_prompt)
        self._batch_size = recipe.embed.batch_size
        self._pictures: list[LatentEncoder] = []
        for made, embed in ((inputs.latents, recipe.embed), (inputs.conditions, None)):
            if made is not None and codec_identity(recipe.model, embed) != made.codec:
                raise ValueError(
                    f"the recipe's VAE is another on this node than {made.codec} on the driver's; "
                    "put the same files on all nodes"
                )
        device = "cuda" if recipe.embed.gpus_per_encoder else "cpu"
        if inputs.latents is not None:
            self._pictures.append(LatentEncoder(recipe.model, recipe.embed, device))
        if recipe.condition_sizes is not None and inputs.conditions is not None:
            sizes = recipe.condition_sizes
            self._pictures.append(ConditionEncoder(recipe.model, recipe.embed, device, sizes))
        self._store = store
        self._writer = writer
        self._prompts = recipe.embed.prompts  # beside which pictures lie
        self._inputs = inputs
        self._plans: list[ShardPlan] = ray.get(plans)
        self._turn = Lock()
        self._name = uuid4().hex
        self._busy = 0.0  # seconds that the text encoder has worked

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Iterator[dict[str, Any]]:
        """Encode and write one shard: progress rows on the way, then the shard's entry.

        Raises:
            SharedDiskError: the driver's store isn't what this machine has under its path.
            RunTakenError: another job has taken the store over.
        """
        require_shared(self._store, self._writer, WRITER_FILE)
        if self._pictures:
            require_visible(self._prompts)
        plan = self._plans[int(batch["shard"][0])]
        with self._turn:
            yield _row(begun=plan.path)
            begin, busy = time.time(), self._seconds()
            plan, encoded, skipped = yield from self._encode_shard(plan)
            work = _Work(self._name, begin, time.time(), self._seconds() - busy)
        entry, report = write_shard(self._store, plan, encoded, self._inputs, skipped)
        yield _row(entry.model_dump_json(), report.to_json(), json.dumps(asdict(work)))

    def _seconds(self) -> float:
        return self._busy + sum(encoder.busy for encoder in self._pictures)

    def _encode_shard(
        self, plan: ShardPlan
    ) -> Generator[
        dict[str, Any], None, tuple[ShardPlan, list[EncodedPrompt], list[SkippedPicture]]
    ]:
        """Progress rows; returns what is left of the plan, its embeddings, what was left out."""
        encoders = [each for each in self._pictures if each.source(plan.prompts[0]) is not None]
        latents: list[dict[str, Tensor]] = [{} for _ in plan.prompts]
        left_out: dict[int, SkippedPicture] = {}
        for encoder in encoders:
            for row, latent in enumerate(encoder.encode(plan.prompts)):
                if isinstance(latent, SkippedPicture):
                    left_out.setdefault(row, latent)
                else:
                    latents[row][encoder.field] = latent
                if encoder is encoders[0] and (row + 1) % self._batch_size == 0:
                    yield _row(prompts=self._batch_size)
        if encoders:
            yield _row(prompts=len(latents) % self._batch_size)
        kept = [found for row, found in enumerate(latents) if row not in left_out]
        plan = plan.without(left_out.keys())
        encoded: dict[int, EncodedPrompt] = {}
        read = None if any(prompt.condition is None for prompt in plan.prompts) else self._picture
        calls = encode_row_groups(plan, self._encode, read)
        while (call := self._timed(calls)) is not None:
            rows, results = call
            encoded.update(zip(rows, results, strict=True))
            if not encoders:
                yield _row(prompts=len(rows))
        ordered = [
            encoded[row]._replace(latent=found.get("latent"), condition=found.get("condition"))
            for row, found in enumerate(kept)
        ]
        return plan, ordered, [left_out[row] for row in sorted(left_out)]

    def _timed(
        self, calls: Iterator[tuple[list[int], list[EncodedPrompt]]]
    ) -> tuple[list[int], list[EncodedPrompt]] | None:
        """The text encoder's next call; None after the last."""
        begin = time.perf_counter()
        call = next(calls, None)
        self._busy += time.perf_counter() - begin
        return call


def _row(
    entry: str = "", report: str = "", work: str = "", prompts: int = 0, begun: str = ""
) -> dict[str, Any]:
    return {
        "prompts": [prompts],
        "begun": [begun],
        "entry": [entry],
        "report": [report],
        "work": [work],
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
    skipped = tuple(picture for shard in shards for picture in shard.report.skipped)
    if len(skipped) == job.inputs.num_prompts:
        raise BadPictureError(
            f"not one of {len(skipped)} pictures can be used, e.g. "
            f"{_example(skipped[0])}; check embed.image_column or condition_column and the "
            "pictures' place"
        )
    return StoreManifest(
        inputs=job.inputs,
        inputs_sha256=job.inputs.digest,
        buckets=_present_buckets(job, [shard.entry for shard in shards]),
        shards=tuple(shard.entry for shard in shards),
        empty_prompt=done[job.empty.path].entry,
        truncated_prompts=sum(shard.report.truncated for shard in shards),
        negative_prompts=(*negative_prompts, *own),
        skipped_pictures=skipped,
    )


def _present_buckets(job: _Job, shards: list[ShardEntry]) -> tuple[Bucket, ...]:
    """The job's buckets with the rows that are there: prompts of bad pictures are not."""
    rows = Counter[int]()
    for shard in shards:
        for group in shard.row_groups:
            rows[group.bucket] += group.rows
    return tuple(
        bucket.model_copy(update={"rows": rows[number]})
        for number, bucket in enumerate(job.buckets)
    )


def _warn_of_memory(recipe: Recipe, job: _Job, console: PlainConsole) -> None:
    """Unpadded prompts are short; with all padding one has 8 to 31 MB until it is stored."""
    config, encoder = recipe.encoder, job.inputs.encoder
    if not config.keeps_padding:
        return
    can_drop = "padding" in type(config).model_fields
    advice = ", or set encoder.padding = drop" if can_drop else ""
    prompt = 4 * encoder.max_tokens * encoder.hidden_size
    shards = min(2, len(job.plans))  # one is written while the next is encoded
    largest = shards * prompt * max(len(plan.prompts) for plan in job.plans)
    if largest > _MUCH_MEMORY:
        fitting = 1 << (int(_MUCH_MEMORY / 2 / prompt).bit_length() - 1)
        _say(
            console,
            f"warning: each encoder actor holds up to {largest / 1e9:.0f} GB of float32 states "
            f"({prompt / 1e6:.1f} MB a prompt with all padding); lower embed.rows_per_shard, e.g. "
            f"to {fitting}, and embed.rows_per_group to 16{advice}",
            style="yellow",
        )


def _warn_of_truncation(console: PlainConsole, finished: list[_Finished], max_tokens: int) -> None:
    count = sum(shard.report.truncated for shard in finished)
    if not count:
        return
    examples = [text for shard in finished for text in shard.report.examples][:3]
    quoted = "; ".join(repr(text if len(text) <= 60 else text[:59] + "…") for text in examples)
    _say(
        console,
        f"warning: {count} prompt(s) have more than {max_tokens} tokens and were truncated, "
        f"e.g. {quoted}; raise encoder.max_tokens to keep them whole",
        style="yellow",
    )


def _example(item: SkippedPicture) -> str:
    """A picture and what is wrong with it, as messages name them: both are foreign text."""
    return f"{shown(repr(item.picture))}: {shown(item.reason)}"


def _tell_of_pictures(console: PlainConsole, manifest: StoreManifest) -> None:
    skipped = manifest.skipped_pictures
    if skipped:
        named = "; ".join(map(_example, skipped[:3]))
        _say(
            console,
            f"warning: {len(skipped)} prompt(s) were left out for their pictures, e.g. {named}; "
            f"{MANIFEST} lists them as skipped_pictures",
            style="yellow",
        )


def encoder_idle_share(work: Iterable[_Work]) -> float:
    """The part of the time that encoders didn't encode, from each one's first prompt to its last.

    They wait for the next shard then, for a picture, or for a place to put a progress row.
    """
    by_actor: dict[str, list[_Work]] = {}
    for item in work:
        by_actor.setdefault(item.actor, []).append(item)
    spans = [max(w.end for w in own) - min(w.begin for w in own) for own in by_actor.values()]
    return 1 - sum(w.busy for own in by_actor.values() for w in own) / sum(spans)


def _tell_of_idleness(console: PlainConsole, finished: list[_Finished]) -> None:
    work = [shard.work for shard in finished if shard.work is not None]
    if work:
        share = encoder_idle_share(work)
        _say(console, f"encoder_idle_share {share:.1%}: the rest of their time encoders encoded")


def _say(console: PlainConsole, text: str, style: str | None = None) -> None:
    """One line: logs are searched by line."""
    console.print(text, style=style, soft_wrap=True)
