"""From the [data] section of a run file to what it names: sources, their packing and order, held-out folders.

Raw text becomes shards in the cache first. Knows no torch.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from llm_dist.config import Config
from llm_dist.data.index import ShardSet
from llm_dist.data.mixture import Segment, exact
from llm_dist.data.order import Order
from llm_dist.data.packing import BestFit, Concatenated, Packing
from llm_dist.data.places import open_place
from llm_dist.data.raw import shards_of
from llm_dist.data.reading import Reading, Source, segments_by_size
from llm_dist.errors import UserError


def open_reading(run: Config) -> Reading:
    """Open every source of a run.

    Raises:
        UserError: which key names what cannot be read, and why; sources made with different tokenizers.
    """
    sources = []
    for name, place in run.data.sources.items():
        key = "data.train" if isinstance(run.data.train, str) else f"data.train.{name}"
        shards = _open(run, key, place)
        try:
            packing = _packing(run, shards)
        except UserError as error:
            raise UserError(f"{key}={place}: {error}") from None
        order = Order(packing.num_windows, packing.cell_windows, run.run.seed)
        sources.append(Source(name, shards, packing, order))
        _check_same_tokenizer(key, place, shards, sources[0].shards)
    segments = [
        Segment(segment.from_step, {name: exact(weight) for name, weight in segment.weights.items()})
        for segment in run.data.mixture
    ] or segments_by_size({source.name: source.packing.num_windows for source in sources})
    return Reading(
        sources,
        segments,
        run.sequences_per_step,
        run.data.sequence_tokens,
        document_mask=run.data.document_mask,
    )


def open_holdouts(run: Config, train: ShardSet) -> dict[str, ShardSet]:
    """The held-out folders by the name of their curve; made with the tokenizer of `train`, any of the sources."""
    opened: dict[str, ShardSet] = {}
    for place in run.data.holdouts:
        shards = _open(run, "data.holdout", place)
        _check_same_tokenizer("data.holdout", place, shards, train)
        opened[_curve_name(place, opened)] = shards
    return opened


def cache_folder(run: Config) -> Path:
    """`data.cache` as a path."""
    return Path(run.data.cache).expanduser()


def _open(run: Config, key: str, place: str) -> ShardSet:
    cache = cache_folder(run)
    try:
        return open_place(shards_of(place, run.data.tokenizer, run.data.split, cache), cache, run.data.cache_gigabytes)
    except UserError as error:
        raise UserError(f"{key}={place}: {error}") from None


def _packing(run: Config, shards: ShardSet) -> Packing:
    if run.data.packing == "best_fit":
        return BestFit(shards, run.data.sequence_tokens, cache_folder(run))
    return Concatenated(shards, run.data.sequence_tokens, run.run.seed)


def _check_same_tokenizer(key: str, place: str, shards: ShardSet, first: ShardSet) -> None:
    if shards.tokenizer_fingerprint != first.tokenizer_fingerprint:
        raise UserError(
            f"{key}={place} was made with another tokenizer than {first.folder}; tokenize both with the same one"
        )


def _curve_name(place: str, taken: dict[str, ShardSet]) -> str:
    path = PurePosixPath(place)
    return path.name if path.name not in taken else f"{path.parent.name}_{path.name}"
