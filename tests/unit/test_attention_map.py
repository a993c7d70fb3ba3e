from __future__ import annotations

import json

import pytest
import torch

from llm_dist import attention_map
from llm_dist.errors import UserError
from tests.unit.model.shapes import built, small

IDS = [0, 11, 12, 13]


def test_maps_are_of_what_was_chosen():
    model = built(small("llama-grouped"))
    every = attention_map.weights(model, IDS, attention_map.choose(model.config, None, "all"))
    assert [each.name for each in every][3:5] == ["layer 0, head 3", "layer 1, head 0"]
    one = attention_map.weights(model, IDS, attention_map.choose(model.config, 1, "2"))
    assert [each.name for each in one] == ["layer 1, head 2"]
    assert torch.equal(one[0].weights, every[6].weights)
    means = attention_map.weights(model, IDS, attention_map.choose(model.config, None, "mean"))
    for layer, each in enumerate(means):
        torch.testing.assert_close(each.weights, torch.stack([m.weights for m in every if m.layer == layer]).mean(0))
        torch.testing.assert_close(each.weights.sum(-1), torch.ones(4))
        assert torch.equal(each.weights, each.weights.tril())
    assert model.training and not any(block.attention._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize(
    ("layer", "head", "said"),
    [
        (2, "mean", "layers 0 to 1"),
        (-1, "mean", "--layer -1"),
        (0, "4", "0 to 3"),
        (0, "x", "--head x"),
        (0, "-1", "-1"),
    ],
)
def test_layers_and_heads_that_are_not_there_are_named(layer, head, said):
    with pytest.raises(UserError, match=said):
        attention_map.choose(small("llama"), layer, head)


@pytest.mark.parametrize("head", ["mean", "all", "0"])
@pytest.mark.parametrize("tokens", [["<|a|>", "$x$ $", "\u4e16", "</script>"], [str(n) for n in range(60)]])
def test_pictures_and_pages_hold_any_token(tmp_path, head, tokens):
    model = built(small("bert"))
    maps = attention_map.weights(model, range(len(tokens)), attention_map.choose(model.config, None, head))
    drawn = attention_map.draw(maps, tokens, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (drawn.tokens, drawn.maps) == (len(tokens), len(maps))
    attention_map.draw(maps, tokens, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("</script>") == 1 and "://" not in page
    data = json.loads(page.partition("const data = ")[2].partition(";\n")[0])
    assert data["tokens"] == tokens
    torch.testing.assert_close(torch.tensor(data["maps"][-1]["weights"]), maps[-1].weights, atol=1e-4, rtol=0)


def test_places_that_cannot_be_written_are_named(tmp_path):
    for name, said in (("a.pdf", "must end in"), ("none/a.png", "no folder")):
        with pytest.raises(UserError, match=said):
            attention_map.check_place(tmp_path / name)


class Letters:
    """Ids 0, 3 and 4 are special; those from 8 on are characters."""

    separator_id, special_ids = 0, {"<|cls|>": 3, "<|sep|>": 4}

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(id_) for id_ in ids if id_ >= 8)

    def id_to_token(self, id_):
        return {0: "<|endoftext|>", 3: "<|cls|>", 4: "<|sep|>"}.get(id_, f"<{id_}>")


def test_decoders_read_a_separator_and_the_text_and_encoders_what_they_learnt():
    assert attention_map.ids_of(Letters(), "ab", small("llama")) == [0, 97, 98]
    ids = attention_map.ids_of(Letters(), "a ", small("modernbert"))
    assert ids == [3, 97, 32, 4]
    assert attention_map.shown_tokens(Letters(), ids) == ["<|cls|>", "a", "<32>", "<|sep|>"]
    with pytest.raises(UserError, match="63 tokens long"):
        attention_map.ids_of(Letters(), "a" * 61, small("bert", max_sequence_tokens=62))
