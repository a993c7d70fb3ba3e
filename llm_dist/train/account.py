"""What a run carries besides tensors: tokens read, the best validation, and how long nothing has improved.

Whatever can change the trajectory lies here and goes into the checkpoint; nothing else is remembered over a restart.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Account:
    """The mutable, JSON-able part of a run's state."""

    step: int = 0
    """Optimizer steps finished."""
    tokens: int = 0
    """Tokens of text read so far."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of text read so far, by source."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last steps that were not left out, newest last: what a spike is measured by."""
    best_loss_nats: float = math.inf
    """Best loss on the first held-out folder."""
    best_step: int | None = None
    """Step of the best loss."""
    evaluations_without_improvement: int = 0
    """Evaluations since the best one."""
    evaluated_step: int | None = None
    """Last step that was evaluated."""

    def saw_evaluation(self, loss_nats: float) -> bool:
        """Take the loss of the first held-out folder at the current step; whether it is the best so far."""
        self.evaluated_step = self.step
        is_best = loss_nats < self.best_loss_nats
        if is_best:
            self.best_loss_nats, self.best_step = loss_nats, self.step
        self.evaluations_without_improvement = 0 if is_best else self.evaluations_without_improvement + 1
        return is_best

    def become(self, other: Account) -> None:
        """Take over another account's numbers, for all who hold this one."""
        self.__dict__.update(other.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; an infinite best loss is absent."""
        fields = asdict(self)
        fields["best_loss_nats"] = None if math.isinf(self.best_loss_nats) else self.best_loss_nats
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Account:
        """The account a checkpoint carries."""
        best = fields.get("best_loss_nats")
        return cls(**{**fields, "best_loss_nats": math.inf if best is None else best})
