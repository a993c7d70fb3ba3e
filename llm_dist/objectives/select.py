"""The objective a run file names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_dist import config, tokenizer
from llm_dist.objectives.causal import Causal
from llm_dist.objectives.classify import Classify
from llm_dist.objectives.instruct import Instruct
from llm_dist.objectives.masked import Masked
from llm_dist.objectives.objective import Objective
from llm_dist.objectives.paired import Paired
from llm_dist.objectives.tag import Tag


def build(run: config.Config, tokenizer_folder: Path, class_weights: Sequence[float] | None = None) -> Objective:
    """The objective of `objective.name`; `class_weights` multiply the loss of each label.

    Raises:
        UserError: the tokenizer's folder is damaged.
    """
    match run.objective.name:
        case "causal":
            return Causal(run.objective.z_loss)
        case "instruct":
            return Instruct(run.objective.z_loss)
        case "masked":
            return Masked(run, tokenizer.load(tokenizer_folder))
        case "masked_nsp" | "masked_sop":
            return Paired(run, tokenizer.load(tokenizer_folder))
        case "classify":
            return Classify(run, tokenizer.load(tokenizer_folder), class_weights)
        case "tag":
            return Tag(run, tokenizer.load(tokenizer_folder), class_weights)
