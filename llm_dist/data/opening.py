"""From the [data] section of a run file to what it names: sources, their packing and order, held-out folders.

Raw text becomes shards in the cache first. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from xxhash import xxh3_64_intdigest

from llm_dist import config_sections, tokenizer
from llm_dist.config import Config
from llm_dist.data.folder import DATASET, INDEX
from llm_dist.data.holdout import HoldoutWindows, SeparateWindows, Windows
from llm_dist.data.index import ShardSet
from llm_dist.data.mixture import Segment, exact
from llm_dist.data.opening_labelled import open_labelled
from llm_dist.data.order import Order
from llm_dist.data.packing import BestFit, Concatenated, Labelled, Packing, Separate
from llm_dist.data.places import is_url, open_place
from llm_dist.data.raw import shards_of
from llm_dist.data.reading import Reading, Source, segments_by_size
from llm_dist.draws import keys
from llm_dist.errors import UserError


def open_reading(run: Config) -> Reading:
    """Open every source of a run.

    Raises:
        UserError: which key names what cannot be read, and why; sources made with different tokenizers.
    """
    _check_tokenizer(run)
    sources = []
    for name, place in run.data.sources.items():
        key = "data.train" if isinstance(run.data.train, str) else f"data.train.{name}"
        shards = open_source(run, key, place, run.data.labels or None)
        try:
            packing = _packing(run, shards, seed := order_seed(run.run.seed, name))
        except UserError as error:
            raise UserError(f"{key}={place}: {error}") from None
        order = Order(packing.num_windows, packing.cell_windows, seed)
        sources.append(Source(name, shards, packing, order))
        _check_same_tokenizer(key, place, shards, sources[0].shards)
    if _needs_partners(run) and sum(source.shards.num_documents for source in sources) < 2:
        raise UserError(
            'objective.name="masked_nsp" takes texts of other documents, and data.train holds a single one; split it '
            '(data.split, llm-dist tokenize --split), or choose "masked_sop"'
        )
    segments = [
        Segment(segment.from_step, {name: exact(weight) for name, weight in segment.weights.items()})
        for segment in run.data.mixture
    ] or segments_by_size({source.name: source.packing.num_windows for source in sources})
    return Reading(
        sources,
        segments,
        run.sequences_per_step,
        run.text_tokens,
        document_mask=run.data.document_mask,
        pair_seed=run.run.seed if _needs_partners(run) else None,
    )


def open_holdouts(run: Config, train: ShardSet) -> dict[str, ShardSet]:
    """The held-out folders by the name of their curve; made with the tokenizer of `train`, any of the sources."""
    opened: dict[str, ShardSet] = {}
    names = None if train.labels is None else train.labels.names
    for place in run.data.holdouts:
        shards = open_source(run, "data.holdout", place, names)
        _check_same_tokenizer("data.holdout", place, shards, train)
        opened[_curve_name(place, opened)] = shards
    return opened


def held_out(
    run: Config, shards: ShardSet, max_sequences: int | None = None, stride_tokens: int | None = None
) -> Windows:
    """A held-out folder in the windows that the run's objective reads; at most `max_sequences` of them.

    Raises:
        UserError: its windows cannot slide by `stride_tokens`.
    """
    if stride_tokens is not None:
        _check_stride(run, stride_tokens)
    if not _is_separate(run):
        return HoldoutWindows(shards, run.text_tokens, run.data.document_mask, max_sequences, stride_tokens)
    pair_seed = run.run.seed if _needs_partners(run) else None
    return SeparateWindows(_separate(run, shards), shards.num_bytes, max_sequences, pair_seed)


def _check_stride(run: Config, stride_tokens: int) -> None:
    if run.objective.name != "causal" or _is_separate(run):
        raise UserError(
            f"--stride {stride_tokens}: windows slide over a stream of text; this run has objective.name="
            f'"{run.objective.name}" and data.packing="{run.data.packing}"; leave the option out'
        )
    if not 0 < stride_tokens <= run.text_tokens:
        raise UserError(f"--stride {stride_tokens}: must be from 1 to data.sequence_tokens={run.text_tokens}")


def settled(run: Config, reading: Reading) -> Config:
    """The run file with what follows from its data written out: names of labels, weights by the sources' sizes."""
    return _with_labels(_with_mixture(run, reading), reading)


def _with_labels(run: Config, reading: Reading) -> Config:
    labels = reading.sources[0].shards.labels
    if labels is None or not run.objective.has_classes:
        return run
    return run.model_copy(update={"data": run.data.model_copy(update={"labels": list(labels.names)})})


def _with_mixture(run: Config, reading: Reading) -> Config:
    if run.data.mixture or len(reading.sources) == 1:
        return run
    weights = {source.name: float(source.packing.num_windows) for source in reading.sources}
    mixture = [config_sections.Segment(from_step=0, weights=weights)]
    return run.model_copy(update={"data": run.data.model_copy(update={"mixture": mixture})})


def order_seed(seed: int, name: str) -> int:
    """Seed of a source's order: sources of one size are not read in step with one another."""
    return int(keys(seed, xxh3_64_intdigest(name.encode()))[0])


def cache_folder(run: Config) -> Path:
    """`data.cache` as a path."""
    return Path(run.data.cache).expanduser()


def open_source(run: Config, key: str, place: str, names: Sequence[str] | None = None) -> ShardSet:
    """What the run's objective reads of `place`, which `key` names: shards, raw text, or labelled examples.

    Labels must be among `names`, where those are given.

    Raises:
        UserError: it cannot be read, and why.
    """
    if run.objective.is_labelled:
        return open_labelled(run, key, place, names)
    cache = cache_folder(run)
    try:
        return open_place(shards_of(place, run.data.tokenizer, run.data.split, cache), cache, run.data.cache_gigabytes)
    except UserError as error:
        is_raw = run.data.tokenizer is None and not is_url(place) and _is_text(Path(place))
        way = ", or name a tokenizer in data.tokenizer to train on it as it is" if is_raw else ""
        raise UserError(f"{key}={place}: {error}{way}") from None


def _is_text(path: Path) -> bool:
    """Whether `path` is something and neither shards nor a folder of shards."""
    is_shards = any((path / name).exists() for name in (DATASET, f"train/{DATASET}", INDEX))
    return path.exists() and not is_shards


def _check_tokenizer(run: Config) -> None:
    if run.data.tokenizer is not None:
        try:
            tokenizer.load(run.data.tokenizer)
        except UserError as error:
            raise UserError(f"data.tokenizer={run.data.tokenizer}: {error}") from None


def _packing(run: Config, shards: ShardSet, seed: int) -> Packing:
    if _is_separate(run):
        return _separate(run, shards)
    if run.data.packing == "best_fit":
        return BestFit(shards, run.text_tokens, cache_folder(run))
    return Concatenated(shards, run.text_tokens, seed)


def _separate(run: Config, shards: ShardSet) -> Separate:
    kind = Labelled if run.objective.is_labelled else Separate
    return kind(shards, run.text_tokens, cache_folder(run))


def _is_separate(run: Config) -> bool:
    return run.data.packing == "separate" or run.objective.is_labelled


def _needs_partners(run: Config) -> bool:
    return run.objective.name == "masked_nsp"


def _check_same_tokenizer(key: str, place: str, shards: ShardSet, first: ShardSet) -> None:
    if shards.tokenizer_fingerprint != first.tokenizer_fingerprint:
        raise UserError(
            f"{key}={place} was made with another tokenizer than {first.folder}; tokenize both with the same one"
        )


def _curve_name(place: str, taken: dict[str, ShardSet]) -> str:
    path = PurePosixPath(place)
    return path.name if path.name not in taken else f"{path.parent.name}_{path.name}"
