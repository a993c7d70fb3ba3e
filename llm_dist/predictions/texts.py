"""How surprising each document is to a language model: nats and bytes, each document read by itself.

The separator stands before a document and is predicted behind it. What is longer than a sequence is read in pieces, so
that every token is predicted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from llm_dist.batch import NOT_SCORED
from llm_dist.data.documents import Split, num_utf8_bytes, read_documents
from llm_dist.data.folder import DATASET
from llm_dist.data.places import is_url
from llm_dist.errors import UserError
from llm_dist.predictions.intervals import Numbers
from llm_dist.trained import Precision, Trained


def read_texts(place: str, split: Split) -> list[str]:
    """The documents of raw text.

    Raises:
        UserError: it is no raw text, or holds less than two documents.
    """
    if is_url(place) or (Path(place) / DATASET).is_file():
        raise UserError(f"--data {place}: models are compared on raw text (.txt, .jsonl, .parquet), not on tokens")
    texts = [document.text for document in read_documents([place], split=split)]
    if len(texts) < 2:
        raise UserError(
            f"--data {place}: holds one document, but what another draw of documents would give is asked for; "
            "say what a document is with --split line or --split blank-line"
        )
    return texts


def surprise(trained: Trained, texts: Sequence[str], precision: Precision | None = None) -> Numbers:
    """Nats and UTF-8 bytes of each text: [n, 2].

    Raises:
        UserError: the run is no causal language model.
    """
    if trained.run.objective.name != "causal":
        raise UserError(
            f'{trained.folder}: objective.name="{trained.run.objective.name}" gives a text no probability; '
            "bits per byte compare causal language models"
        )
    numbers = np.zeros((len(texts), 2))
    numbers[:, 1] = [num_utf8_bytes(text) for text in texts]
    model = trained.model(precision)
    device, sequences = model.embedding.weight.device, trained.run.batch.sequences_per_micro_batch
    pieces = list(_pieces(trained, texts))
    pieces.sort(key=lambda piece: len(piece[1]))
    with torch.inference_mode():
        for first in range(0, len(pieces), sequences):
            chosen = pieces[first : first + sequences]
            longest = max(len(ids) for _, ids in chosen) - 1
            inputs = torch.zeros(len(chosen), longest, dtype=torch.int64)
            labels = torch.full(inputs.shape, NOT_SCORED)
            for row, (_, ids) in enumerate(chosen):
                inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                labels[row, : len(ids) - 1] = torch.tensor(ids[1:])
            hidden, targets = model(inputs.to(device)), labels.to(device)
            for row, (text, _) in enumerate(chosen):
                numbers[text, 0] += model.language(hidden[row : row + 1], targets[row : row + 1]).nats.double().item()
    return numbers


def _pieces(trained: Trained, texts: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
    """Number of the text and ids, the first of which is only read: at most one more than a sequence has."""
    separator, most = trained.tokenizer.separator_id, trained.run.text_tokens
    for number, ids in enumerate(trained.tokenizer.encode_batch(texts)):
        closed = [separator, *ids, separator]
        for first in range(0, len(closed) - 1, most):
            yield number, closed[first : first + most + 1]
