"""Responses to prompts: causal language modelling in which only what an assistant says is scored."""

from __future__ import annotations

from llm_dist.batch import Batch
from llm_dist.objectives.causal import Causal
from llm_dist.objectives.labelled import trimmed_tokens
from llm_dist.rows import Rows


class Instruct(Causal):
    """Predict each token of the responses from all that stands before it."""

    scores_text = False

    def make_batch(self, rows: Rows, num_rows: int) -> Batch:
        """A batch as long as its longest conversation."""
        assert rows.targets is not None
        length = trimmed_tokens(rows)
        inputs, following, targets = (array[:, :length] for array in (rows.inputs, rows.following, rows.targets))
        return super().make_batch(rows._replace(inputs=inputs, following=following, targets=targets), num_rows)
