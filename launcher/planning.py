"""Joins a run file with what its shard folder says, plans it, and looks for what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.capacity import machine_here
from llm_dist.config import Config
from llm_dist.data.fetch import Fetcher
from llm_dist.data.folder import DATASET, read_dataset
from llm_dist.data.opening_labelled import tokenizer_of
from llm_dist.data.places import is_url
from llm_dist.data.remote import remote_dataset
from llm_dist.model.size import GPU
from llm_dist.plan import USABLE_MEMORY, Plan, make_plan, memory_of
from llm_dist.tokenizer import read_description

MAX_SUGGESTED_RANKS = 16_384


@dataclass(frozen=True)
class DataSize:
    """What planning needs to know of the training data."""

    vocabulary_tokens: int
    num_tokens: int | None
    """None: the shard folder is not there yet and the vocabulary is the run file's guess."""


def data_size(config: Config, must_exist: bool) -> DataSize:
    """Sizes from the shard folder; where it is not there yet, from the run file.

    Raises:
        UserError: it must exist and does not, or it is broken.
    """
    datasets = [_dataset(config, place, must_exist) for place in config.data.sources.values()]
    known = [dataset for dataset in datasets if dataset is not None]
    if not known:
        return DataSize(_vocabulary_of_text(config), None)
    vocabulary_tokens = max(int(dataset["vocabulary_tokens"]) for dataset in known)
    if len(known) < len(datasets):
        return DataSize(vocabulary_tokens, None)
    return DataSize(vocabulary_tokens, sum(int(dataset["num_tokens"]) for dataset in known))


def _dataset(config: Config, place: str, must_exist: bool) -> dict[str, Any] | None:
    """dataset.json of a source; None where it is not there yet, or made of text when the run starts."""
    if is_url(place):
        return remote_dataset(Fetcher(place))
    is_there = (Path(place) / DATASET).exists()
    is_raw_text = (config.objective.is_labelled or config.data.tokenizer is not None) and Path(place).exists()
    return None if not is_there and (is_raw_text or not must_exist) else read_dataset(Path(place))


def _vocabulary_of_text(config: Config) -> int:
    """Tokens of the tokenizer that will read the text; the run file's guess where there is none yet."""
    folder = tokenizer_of(config)
    if folder is None or not Path(folder).is_dir():
        return config.plan.vocabulary_tokens
    return int(read_description(Path(folder))["report"]["vocabulary_tokens"])


def plan_of(config: Config, data: DataSize, ranks: int, gpu: str | None = None, price: float | None = None) -> Plan:
    """Plan a run on `ranks` ranks of a named GPU, else of this machine."""
    machine = GPU if gpu else machine_here()
    return make_plan(
        config, data.vocabulary_tokens, ranks, data.num_tokens, machine=machine, gpu=gpu, price_per_hour=price
    )


def what_fits(config: Config, vocabulary_tokens: int, plan: Plan) -> str | None:
    """The smallest change after which a run fits: micro-batch, then recompute, then sharding, then more ranks.

    None where it fits already or no GPU was named.
    """
    if plan.pace is None or plan.pace.fits:
        return None
    ranks, micro_batch = plan.rows.ranks, config.batch.sequences_per_micro_batch
    halves = [micro_batch >> power for power in range(1, micro_batch.bit_length())]
    recompute, sharded = {"recompute": "full"}, {"name": "fsdp", "recompute": "full"}
    tries: list[tuple[int, int, dict[str, Any]]] = [
        *((ranks, rows, {}) for rows in halves),
        *((ranks, rows, recompute) for rows in (micro_batch, *halves)),
        *((ranks << power, 1, sharded) for power in range((MAX_SUGGESTED_RANKS // ranks).bit_length())),
    ]
    for many, rows, engine in tries:
        changed = _changed(config, rows, engine)
        if memory_of(changed, vocabulary_tokens, many).peak <= plan.pace.memory_bytes * USABLE_MEMORY:
            return _words(config, changed, ranks, many)
    return "a smaller model or a shorter data.sequence_tokens: no number of ranks makes this one fit"


def _changed(config: Config, rows: int, engine: dict[str, Any]) -> Config:
    if engine.get("name") == "fsdp":
        engine = {**engine, "shard_ranks": None}
    return config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"sequences_per_micro_batch": rows}),
            "engine": config.engine.model_copy(update=engine),
        }
    )


def _words(before: Config, after: Config, ranks: int, many: int) -> str:
    words = []
    for section in ("batch", "engine"):
        old, new = getattr(before, section).model_dump(), getattr(after, section).model_dump()
        words += [f"{section}.{key}={value}" for key, value in new.items() if value != old[key]]
    return " ".join(words + ([f"--ranks {many}"] if many != ranks else []))
