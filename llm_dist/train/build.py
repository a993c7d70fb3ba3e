"""From a run file to the parts of a run: data, objective, engine, store. Nothing here trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_dist import config, tokenizer
from llm_dist.checkpoint import layout
from llm_dist.checkpoint.store import read_parameters
from llm_dist.data import opening
from llm_dist.data.index import ShardSet
from llm_dist.data.loader import Loader
from llm_dist.data.opening_labelled import class_weights
from llm_dist.data.reading import Reading
from llm_dist.engine import select
from llm_dist.engine.engine import Engine, FillParameter
from llm_dist.errors import UserError
from llm_dist.exchange.load import is_hugging_face
from llm_dist.exchange.start import Fill, fill_from_hugging_face, new_heads
from llm_dist.model.init import initial_value
from llm_dist.model.size import parameter_shapes
from llm_dist.model.transformer import Transformer
from llm_dist.objectives import select as objectives
from llm_dist.objectives.objective import Objective, Trainee
from llm_dist.runtime import Runtime

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DataFolders:
    """The opened data of a run."""

    reading: Reading
    holdouts: dict[str, ShardSet]

    @property
    def any_shards(self) -> ShardSet:
        """One of the sources: all have the same tokenizer."""
        return self.reading.sources[0].shards

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the tokenizer, and `data.NAME` of each source: what a run belongs to, wherever the folders lie."""
        sources = {f"data.{source.name}": source.shards.fingerprint for source in self.reading.sources}
        return {"tokenizer": self.any_shards.tokenizer_fingerprint, **sources}


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    run: config.Config
    runtime: Runtime
    data: DataFolders
    objective: Objective
    engine: Engine

    def loader(self, first_step: int) -> Loader:
        """This rank's rows from a step on."""
        here = self.runtime
        return Loader(self.data.reading, here.ranks, here.rank, workers=self.run.data.workers, first_step=first_step)

    def close(self) -> None:
        """Release files and what the engine's vendor holds."""
        self.engine.close()
        self.data.reading.close()
        for shards in self.data.holdouts.values():
            shards.close()


def open_data(run: config.Config) -> DataFolders:
    """Open and check every source and held-out folder the run names."""
    reading = opening.open_reading(run)
    return DataFolders(reading, opening.open_holdouts(run, reading.sources[0].shards))


def build(run: config.Config, runtime: Runtime, data: DataFolders, report: Callable[[str], None]) -> Parts:
    """Build the model and hand it to its engine; collective: all ranks call this."""
    weights = class_weights(run, data.any_shards)
    objective = objectives.build(run, data.any_shards.tokenizer_folder, weights)
    with torch.device(select.CONSTRUCTION_DEVICE[run.engine.name]):
        model = build_model(run, data.any_shards.vocabulary_tokens)
    engine = select.build(Trainee(model, objective), _fill(run, data, report), run, runtime, report)
    return Parts(run, runtime, data, objective, engine)


def build_model(run: config.Config, vocabulary_tokens: int) -> Transformer:
    """The model of a run file, its parameters not yet initialised."""
    return Transformer(run.model, vocabulary_tokens, COMPUTE_DTYPE[run.engine.precision], run.heads)


def _fill(run: config.Config, data: DataFolders, report: Callable[[str], None]) -> FillParameter:
    at_random = _fill_at_random(run)
    if run.init.source is None:
        return at_random
    source = Path(run.init.source)
    if not is_hugging_face(source):
        return _fill_from(source, run, data.any_shards, report)
    own = tokenizer.load(data.any_shards.tokenizer_folder)
    return fill_from_hugging_face(source, run.model, run.heads, own, at_random, report)


def _fill_from(source: Path, run: config.Config, shards: ShardSet, report: Callable[[str], None]) -> FillParameter:
    """Weights of the checkpoint, or of the latest one of the run folder, that `init.from` names."""
    try:
        found = layout.find(source)
    except UserError as error:
        raise UserError(f"init.from: {error}") from None
    own_tokenizer = found.folder.parent.parent / "tokenizer"
    if own_tokenizer.is_dir() and tokenizer.load(own_tokenizer).fingerprint != shards.tokenizer_fingerprint:
        raise UserError(
            f"init.from={source}: the tokenizer does not fit the checkpoint: {shards.folder} was made with another "
            f"one; tokenize with {own_tokenizer}"
        )
    weights, at_random = read_parameters(found.folder), _fill_at_random(run)
    shapes = parameter_shapes(run.model, shards.vocabulary_tokens, run.heads)
    new = new_heads(source, shapes, {name: tuple(weight.shape) for name, weight in weights.items()}, report)

    def fill(name: str, shape: torch.Size) -> Tensor:
        if name in new:
            return at_random(name, shape)
        there = weights[name].shape if name in weights else None
        if there != shape:
            is_there = f"has shape {list(there)}" if there is not None else "is not there"
            raise UserError(
                f"init.from={source}: {name} {is_there} and has shape {list(shape)} here; "
                "start from a model of the same [model] section and vocabulary"
            )
        return weights[name]

    return fill


def _fill_at_random(run: config.Config) -> Fill:
    def fill(name: str, shape: Sequence[int]) -> Tensor:
        return initial_value(name, tuple(shape), run.model, run.init.std, run.run.seed)

    return fill
