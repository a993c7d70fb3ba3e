"""From a run file to the parts of a run: data, objective, engine, store. Nothing here trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_dist import config, objectives
from llm_dist.checkpoint import layout
from llm_dist.checkpoint.store import read_parameters
from llm_dist.data.index import ShardSet, open_shards
from llm_dist.data.loader import Loader
from llm_dist.data.order import Order
from llm_dist.engine import select
from llm_dist.engine.engine import Engine, FillParameter
from llm_dist.errors import UserError
from llm_dist.model.init import initial_value
from llm_dist.model.transformer import Transformer
from llm_dist.objectives import Objective, Trainee
from llm_dist.runtime import Runtime

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class DataFolders:
    """The opened shard folders of a run."""

    train: ShardSet
    holdouts: dict[str, ShardSet]
    order: Order

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a run on this data belongs to, wherever the folders lie."""
        return {"data": self.train.fingerprint, "tokenizer": self.train.tokenizer_fingerprint}


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    run: config.Config
    runtime: Runtime
    data: DataFolders
    objective: Objective
    engine: Engine

    @property
    def sequences_per_step(self) -> int:
        """Rows of a step's global set."""
        return self.run.batch.tokens_per_step // self.run.data.sequence_tokens

    def loader(self, first_step: int) -> Loader:
        """This rank's rows from a step on."""
        return Loader(
            self.data.train,
            self.data.order,
            sequences_per_step=self.sequences_per_step,
            ranks=self.runtime.ranks,
            rank=self.runtime.rank,
            document_mask=self.run.data.document_mask,
            workers=self.run.data.workers,
            first_step=first_step,
        )

    def close(self) -> None:
        """Release files and what the engine's vendor holds."""
        self.engine.close()
        for shards in (self.data.train, *self.data.holdouts.values()):
            shards.close()


def open_data(run: config.Config) -> DataFolders:
    """Open and check every shard folder the run names."""
    train = _open("data.train", run.data.train)
    order = Order(train.num_tokens, run.data.sequence_tokens, run.run.seed)
    return DataFolders(train, _open_holdouts(run, train), order)


def build(run: config.Config, runtime: Runtime, data: DataFolders, report: Callable[[str], None]) -> Parts:
    """Build the model and hand it to its engine; collective: all ranks call this."""
    objective = objectives.build(run.objective)
    with torch.device(select.CONSTRUCTION_DEVICE[run.engine.name]):
        model = build_model(run, data.train.vocabulary_tokens)
    engine = select.build(Trainee(model, objective), _fill(run), run, runtime, report)
    return Parts(run, runtime, data, objective, engine)


def build_model(run: config.Config, vocabulary_tokens: int) -> Transformer:
    """The model of a run file, its parameters not yet initialised."""
    return Transformer(run.model, vocabulary_tokens, COMPUTE_DTYPE[run.engine.precision])


def _open(key: str, folder: str) -> ShardSet:
    try:
        return open_shards(folder)
    except UserError as error:
        raise UserError(f"{key}={folder}: {error}") from None


def _open_holdouts(run: config.Config, train: ShardSet) -> dict[str, ShardSet]:
    """The held-out folders by the name of their curve; made with the training data's tokenizer."""
    opened: dict[str, ShardSet] = {}
    for folder in run.data.holdouts:
        shards = _open("data.holdout", folder)
        if shards.tokenizer_fingerprint != train.tokenizer_fingerprint:
            raise UserError(
                f"data.holdout={folder} was made with another tokenizer than data.train={run.data.train}; "
                "tokenize both with the same one"
            )
        opened[_curve_name(folder, opened)] = shards
    return opened


def _curve_name(folder: str, taken: dict[str, ShardSet]) -> str:
    path = Path(folder)
    return path.name if path.name not in taken else f"{path.parent.name}_{path.name}"


def _fill(run: config.Config) -> FillParameter:
    return _fill_at_random(run) if run.init.source is None else _fill_from(Path(run.init.source))


def _fill_from(source: Path) -> FillParameter:
    """Weights of the checkpoint, or of the latest one of the run folder, that `init.from` names."""
    try:
        found = layout.find(source)
    except UserError as error:
        raise UserError(f"init.from: {error}") from None
    weights = read_parameters(found.folder)

    def fill(name: str, shape: torch.Size) -> Tensor:
        there = weights[name].shape if name in weights else None
        if there != shape:
            is_there = f"has shape {list(there)}" if there is not None else "is not there"
            raise UserError(
                f"init.from={source}: {name} {is_there} and has shape {list(shape)} here; "
                "start from a model of the same [model] section and vocabulary"
            )
        return weights[name]

    return fill


def _fill_at_random(run: config.Config) -> FillParameter:
    def fill(name: str, shape: torch.Size) -> Tensor:
        return initial_value(name, tuple(shape), run.model, run.init.std, run.run.seed)

    return fill
