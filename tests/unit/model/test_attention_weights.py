from __future__ import annotations

import pytest
import torch

from tests.unit.model.shapes import CAUSAL, KINDS, built, small, some_ids


@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_are_the_output(kind):
    model, seen = built(small(kind)).eval(), []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda *call: seen.append(call))
    with torch.no_grad():
        model(some_ids())
        for attention, (x, rotary, mask, _), output in seen:
            weights = attention.weights(x, rotary, mask)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            value = attention.projected(x, rotary)[2]
            mixed = weights @ value.repeat_interleave(weights.size(1) // value.size(1), 1)
            torch.testing.assert_close(attention.output(mixed.transpose(1, 2).flatten(2)), output)
            assert torch.equal(weights, weights.tril()) == (kind in CAUSAL)
    assert len(seen) == 2
