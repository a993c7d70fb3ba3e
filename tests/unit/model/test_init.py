from __future__ import annotations

import pytest
import torch

from llm_dist.model.init import initial_value, rule_of
from tests.unit.model.shapes import KINDS, built, small


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_starts_as_the_table_says(kind):
    model = small(kind, d_model=128, d_ff=256)
    for name, parameter in built(model, std=0.02).named_parameters():
        rule, values = rule_of(name), parameter.detach()
        if rule in {"ones", "zeros"}:
            assert torch.all(values == float(rule == "ones")), name
            assert ("norm" in name) == (rule == "ones") or name.endswith("bias")
        else:
            expected = 0.02 / (2 * model.layers) ** 0.5 if rule == "residual" else 0.02
            assert values.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(values.mean().item()) < 0.05 * expected * 3, name


def test_residual_outputs_are_the_two_that_write_to_the_stream():
    residual = {
        name.split(".", 2)[2] for name, _ in built(small("llama")).named_parameters() if rule_of(name) == "residual"
    }
    assert residual == {"attention.output.weight", "feed_forward.down.weight"}


def test_values_depend_on_seed_and_name_alone():
    model, name = small("llama"), "blocks.1.attention.query.weight"
    torch.manual_seed(5)
    first = initial_value(name, (32, 32), model, 0.02, seed=7)
    torch.manual_seed(6)
    assert torch.equal(first, initial_value(name, (32, 32), model, 0.02, seed=7))
    assert torch.equal(first, dict(built(model, std=0.02, seed=7).named_parameters())[name])
    assert not torch.equal(first, initial_value(name, (32, 32), model, 0.02, seed=8))
    assert not torch.equal(first, initial_value(name.replace("1", "0"), (32, 32), model, 0.02, seed=7))


def test_values_are_what_they_were():
    """A run that starts from its seed next year starts from the same weights."""
    values = initial_value("embedding.weight", (4, 4), small("llama"), 0.02, seed=0)
    torch.testing.assert_close(
        values[0], torch.tensor([0.02025506, 0.03123856, -0.02520367, 0.02880842]), rtol=1e-4, atol=1e-7
    )


def test_unknown_parameter_is_a_defect():
    with pytest.raises(AssertionError, match=r"blocks\.0\.gain"):
        rule_of("blocks.0.gain")
