"""How often each class was taken for each, and the scores that follow.

The full report (per class, micro and macro) is scikit-learn's, after training; these few numbers are what validation
during training needs, from sums that ranks can add. A test holds them against scikit-learn's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_dist.batch import NOT_SCORED


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts fp64 [classes^2] by true class, then predicted one, of labels and predictions of one shape."""
    is_scored = labels != NOT_SCORED
    pairs = labels[is_scored] * num_classes + predicted[is_scored]
    return torch.bincount(pairs, minlength=num_classes**2).double()


def scores_of(counts: npt.NDArray[np.float64]) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the classes that occur, from counts [classes, classes]."""
    right, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    occurs = true + predicted > 0
    f1 = 2 * right[occurs] / (true + predicted)[occurs]
    return {"accuracy": float(right.sum() / max(1.0, counts.sum())), "macro_f1": float(f1.mean()) if len(f1) else 0.0}
