"""A trained model taken from a checkpoint for use: scored, sampled, exported. One process, no engine."""

from __future__ import annotations

import atexit
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

import torch
from torch import Tensor

from llm_dist import config
from llm_dist import tokenizer as tokenizers
from llm_dist.checkpoint import layout
from llm_dist.checkpoint.store import read_parameters
from llm_dist.data.index import ShardSet
from llm_dist.data.opening import held_out, open_source
from llm_dist.data.places import open_place
from llm_dist.errors import UserError
from llm_dist.evaluate import Evaluation, evaluate
from llm_dist.exchange.adapter import export_adapter
from llm_dist.exchange.export import export
from llm_dist.exchange.load import HuggingFaceModel, is_hugging_face, open_folder
from llm_dist.exchange.prepare import run_of
from llm_dist.model.adapters import merged
from llm_dist.model.size import parameter_shapes
from llm_dist.model.transformer import Transformer
from llm_dist.objectives import select as objectives
from llm_dist.objectives.objective import Trainee
from llm_dist.runtime import Runtime
from llm_dist.tokenizer import Tokenizer
from llm_dist.tokenizer_import import import_tokenizer

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, and what is needed to use it."""

    run: config.Config
    step: int
    folder: Path
    tokenizer: Tokenizer
    hugging_face: HuggingFaceModel | None = None
    """The folder of theirs that stands for a checkpoint."""

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, full, fp32, verified; low-rank updates are in the weights."""
        if self.hugging_face is None:
            return merged(read_parameters(self.folder), self.run.lora)
        names = parameter_shapes(self.run.model, self.tokenizer.vocabulary_tokens, self.run.heads)
        return {name: self.hugging_face.parameter(name) for name in names}

    def model(self, precision: Precision | None = None) -> Transformer:
        """The model, ready to use, on the GPU where there is one; `precision` is the run's own by default."""
        precision = precision or self.run.engine.precision
        with torch.device("meta"):
            model = Transformer(self.run.model, self.tokenizer.vocabulary_tokens, DTYPES[precision], self.run.heads)
        weights = self.parameters()
        is_tied = self.run.model.tied_head and self.run.heads.language
        if is_tied:
            weights["head.weight"] = weights["embedding.weight"]
        model.load_state_dict(weights, assign=True)
        if is_tied:
            model.language.weight = model.embedding.weight
        return model.to(_device()).eval()


def find(path: Path, step: int | None = None, best: bool = False) -> Trained:
    """The checkpoint that a run folder, a checkpoint folder or a Hugging Face folder means.

    Raises:
        UserError: there is none, or the run folder it lies in lacks its run file or tokenizer.
    """
    if is_hugging_face(path):
        if step is not None or best:
            raise UserError(f"{path} is a Hugging Face folder, which holds one checkpoint; leave --step and --best out")
        return _find_hugging_face(path)
    found = layout.find(path, step, best)
    run_folder = found.folder.parent.parent
    if not (run_folder / "config.json").is_file():
        raise UserError(
            f"{found.folder} does not lie in a run folder; keep it under RUN/checkpoints beside config.json"
        )
    run, tokenizer = config.load(run_folder), tokenizers.load(run_folder / "tokenizer")
    trained_with = layout.read_manifest(found.folder).fingerprints.get("tokenizer", tokenizer.fingerprint)
    if trained_with != tokenizer.fingerprint:
        raise UserError(
            f"{tokenizer.folder}: has fingerprint {tokenizer.fingerprint[:12]}, the checkpoint was trained with "
            f"{trained_with[:12]}; put the run's own tokenizer back"
        )
    return Trained(run, found.step, found.folder, tokenizer)


def _find_hugging_face(path: Path) -> Trained:
    source = open_folder(path)
    scratch = Path(mkdtemp(prefix="llm_dist-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    import_tokenizer(path, scratch / "tokenizer")
    tokenizer = tokenizers.load(scratch / "tokenizer")
    if tokenizer.vocabulary_tokens != source.vocabulary_tokens:
        raise UserError(
            f"{path}: the tokenizer does not fit the checkpoint: it has {tokenizer.vocabulary_tokens} tokens, the "
            f"checkpoint {source.vocabulary_tokens}"
        )
    return Trained(run_of(source), 0, path, tokenizer, source)


def open_held_out(trained: Trained, place: str) -> ShardSet:
    """What `--data` names: shards, or, for a run that learns from examples, a file of them.

    Raises:
        UserError: it cannot be read, and why.
    """
    if not trained.run.objective.is_labelled:
        return open_place(place)
    own = {"tokenizer": str(trained.tokenizer.folder)}
    run = trained.run.model_copy(update={"data": trained.run.data.model_copy(update=own)})
    return open_source(run, "--data", place, run.data.labels or None)


def score(
    trained: Trained, shards: ShardSet, precision: Precision | None = None, stride_tokens: int | None = None
) -> Evaluation:
    """Evaluate on a shard folder made with the same tokenizer; windows of text begin `stride_tokens` apart."""
    if shards.tokenizer_fingerprint != trained.tokenizer.fingerprint:
        raise UserError(
            f"{shards.folder} was made with another tokenizer than this model; tokenize the text with the run's own, "
            f"{trained.tokenizer.folder}"
        )
    run = trained.run
    objective = objectives.build(run, trained.tokenizer.folder)
    trainee = Trainee(trained.model(precision), objective)
    with torch.no_grad():
        return evaluate(
            trainee,
            objective,
            held_out(run, shards, stride_tokens=stride_tokens),
            Runtime(0, 1, 0, _device()),
            sequences_per_batch=run.batch.sequences_per_micro_batch,
        )


@dataclass(frozen=True)
class Exported:
    """What `export_to` wrote."""

    out: str
    step: int
    hugging_face_class: str
    dtype: str


def export_to(trained: Trained, out: Path, dtype: Precision) -> Exported:
    """Write the checkpoint as a Hugging Face folder."""
    name = export(
        trained.parameters(),
        trained.run.model,
        trained.tokenizer.folder,
        out,
        real_vocabulary_tokens=trained.tokenizer.vocabulary_tokens,
        dtype=dtype,
        heads=trained.run.heads,
        labels=tuple(trained.run.data.labels),
        special_ids=trained.tokenizer.special_ids,
        end_id=min(trained.tokenizer.end_ids - {trained.tokenizer.separator_id}, default=None),
    )
    return Exported(str(out), trained.step, str(name), dtype)


def export_adapter_to(trained: Trained, out: Path) -> Exported:
    """Write the low-rank updates of the checkpoint, and the heads trained beside them, as a folder of PEFT's.

    Raises:
        UserError: the run has none, no class of `transformers` computes its model, or `out` is in use.
    """
    if trained.run.lora.rank is None:
        raise UserError(f"{trained.folder} has no adapter: its run did not set lora.rank; leave --adapter out")
    weights = read_parameters(trained.folder)
    name = export_adapter(weights, trained.run, out, trained.tokenizer.special_ids)
    return Exported(str(out), trained.step, name, "fp32")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
