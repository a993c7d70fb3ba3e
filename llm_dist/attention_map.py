"""What each token of a text looks at: a model's attention weights as a picture or as a page.

Knows a model and a tokenizer; nothing of runs, checkpoints or engines.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_dist import config
from llm_dist.errors import UserError
from llm_dist.model.attention import Attention
from llm_dist.model.transformer import Transformer
from llm_dist.tokenizer import CLS, SEP, Tokenizer

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_MOST_LABELS = 48
"""Tokens whose names still fit beside a picture."""
_ENDINGS = (".png", ".html")


class Choice(NamedTuple):
    """Which weights to look at."""

    layers: Sequence[int]
    heads: Sequence[int] | None
    """None: the mean over all."""


class Map(NamedTuple):
    """Weights of a head, or the mean of a layer's heads."""

    name: str
    layer: int
    weights: Tensor
    """Fp32 [T, T], rows that look, columns looked at."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn."""

    out: str
    tokens: int
    maps: int


def check_place(out: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        UserError: its ending names no form, or its folder is not there.
    """
    if out.suffix not in _ENDINGS:
        raise UserError(f"--out {out}: must end in {' or '.join(_ENDINGS)}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")


def choose(model: config.Model, layer: int | None, head: str) -> Choice:
    """What `layer` (None: all) and `head` ("mean", "all" or a number) mean.

    Raises:
        UserError: the model has no such layer or head.
    """
    if layer is not None and not 0 <= layer < model.layers:
        raise UserError(f"--layer {layer}: the model has layers 0 to {model.layers - 1}")
    layers = range(model.layers) if layer is None else [layer]
    if head in ("mean", "all"):
        return Choice(layers, None if head == "mean" else range(model.heads))
    if not (head.isascii() and head.isdecimal() and int(head) < model.heads):
        raise UserError(f"--head {head}: must be mean, all or a head, 0 to {model.heads - 1}")
    return Choice(layers, [int(head)])


def ids_of(tokenizer: Tokenizer, text: str, model: config.Model) -> list[int]:
    """Separator and text for decoders, `[cls] text [sep]` for encoders.

    Raises:
        UserError: the text holds no token, or more than the model reads.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError(f"--text {text!r} holds no token; give some words")
    if model.is_causal:
        ids = [tokenizer.separator_id, *ids]
    else:
        ids = [tokenizer.special_ids[CLS], *ids, tokenizer.special_ids[SEP]]
    if len(ids) > model.max_sequence_tokens:
        raise UserError(
            f"--text is {len(ids)} tokens long with the special ones; it must fit "
            f"model.max_sequence_tokens={model.max_sequence_tokens}; shorten it"
        )
    return ids


def shown_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each id as a person reads it; as the vocabulary writes it where it is special, blank or half a character."""
    shown = []
    for id_ in ids:
        text = tokenizer.decode([id_])
        is_readable = text.strip() and _UNREADABLE not in text
        shown.append(text if is_readable else tokenizer.id_to_token(id_) or str(id_))
    return shown


def weights(model: Transformer, ids: Sequence[int], choice: Choice) -> list[Map]:
    """Weights of the chosen layers and heads while the model reads `ids`, layer by layer."""
    found: list[Map] = []

    def look(layer: int, attention: Attention, inputs: tuple[Any, ...]) -> None:
        by_head = attention.weights(*inputs[:3])[0].cpu()
        if choice.heads is None:
            found.append(Map(f"layer {layer}, mean", layer, by_head.mean(0)))
        else:
            found.extend(Map(f"layer {layer}, head {head}", layer, by_head[head]) for head in choice.heads)

    hooks = [
        model.blocks[layer].attention.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda attention, inputs, layer=layer: look(layer, attention, inputs)
        )
        for layer in choice.layers
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(torch.tensor([list(ids)], device=model.embedding.weight.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def draw(maps: Sequence[Map], tokens: Sequence[str], out: Path) -> Drawn:
    """Write a picture or a page, by the ending of `out`."""
    check_place(out)
    if out.suffix == ".png":
        figure = _figure(maps, tokens)
        with warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(out, dpi=110)
    else:
        out.write_text(_page(maps, tokens), encoding="utf-8")
    return Drawn(str(out), len(tokens), len(maps))


def _figure(maps: Sequence[Map], tokens: Sequence[str]):  # type: ignore[no-untyped-def]
    """A grid: a row per layer and a column per head; means beside each other."""
    from matplotlib.figure import Figure

    num_layers = len({each.layer for each in maps})
    columns = len(maps) // num_layers
    if columns == 1:
        columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    is_named = len(tokens) <= _MOST_LABELS
    side = max(2.2, 0.17 * len(tokens)) if is_named else 4.0
    side = min(side, 100 / max(rows, columns))  # 11,000 pixels: larger pictures fill the memory
    figure = Figure(figsize=(columns * side + 1, rows * (side + 0.3) + 1), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, each in zip(grid, maps, strict=False):
        axes.imshow(each.weights.numpy(), vmin=0, cmap="Blues")
        axes.set_title(each.name, fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            if is_named:
                axis.set_ticks(range(len(tokens)), labels=tokens, fontsize=6, parse_math=False)
            else:
                axis.set_ticks([])
        axes.tick_params(axis="x", labelrotation=90)
    for axes in grid[len(maps) :]:
        axes.set_axis_off()
    return figure


def _page(maps: Sequence[Map], tokens: Sequence[str]) -> str:
    data = {
        "tokens": list(tokens),
        "maps": [
            {"name": each.name, "weights": [[round(value, 4) for value in row] for row in each.weights.tolist()]}
            for each in maps
        ],
    }
    # No text can end the script it stands in.
    return _PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>attention</title>
<style>
body { font: 16px/1.9 sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
.token { border-radius: 3px; margin-right: 2px; cursor: default; padding: 2px 1px; white-space: pre-wrap; }
.looks { outline: 2px solid #d9480f; }
#said { color: #666; min-height: 2em; }
</style>
<p><label>Weights of <select id="which"></select></label></p>
<p id="said">Move the pointer over a token: the darker another, the more the token looks at it.</p>
<p id="text"></p>
<script>
const data = DATA;
const which = document.getElementById("which"), said = document.getElementById("said");
const spans = data.tokens.map((token) => {
  const span = document.createElement("span");
  span.className = "token";
  span.tabIndex = 0;
  span.textContent = token;
  document.getElementById("text").append(span, "\\u200b");
  return span;
});
data.maps.forEach((map, number) => which.add(new Option(map.name, number)));
let looking = null;
function show() {
  if (looking === null) return;
  const row = data.maps[which.value].weights[looking];
  const most = Math.max(...row);
  spans.forEach((span, place) => {
    span.classList.toggle("looks", place === looking);
    span.style.background = `rgba(28, 126, 214, ${row[place] / most})`;
    span.title = `${(100 * row[place]).toFixed(1)} %`;
  });
  const order = row.map((weight, place) => [weight, place]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  said.textContent = JSON.stringify(data.tokens[looking]) + " looks at "
    + order.map(([weight, place]) => `${JSON.stringify(data.tokens[place])} ${(100 * weight).toFixed(1)} %`).join(", ");
}
spans.forEach((span, place) => {
  for (const event of ["mouseenter", "focus"]) span.addEventListener(event, () => { looking = place; show(); });
});
which.addEventListener("change", show);
</script>
</html>
"""
