"""Reads a Hugging Face config.json with respect: what we do not compute the same is refused, naming key and value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_dist.config import FeedForwardKind
from llm_dist.errors import UserError

ACTIVATIONS: dict[str, FeedForwardKind] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Their names of functions without a gate."""
ACTIVATION_NAMES: dict[FeedForwardKind, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "swiglu": "silu",
    "geglu": "gelu",
}
"""Our names -> theirs."""

NEITHER = (False, None)
_NOWHERE: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "is_decoder": NEITHER,
    "is_encoder_decoder": NEITHER,
    "add_cross_attention": NEITHER,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "pruned_heads": (None, {}),
}
"""What no model of ours has, and the values that mean that it is not there."""


class HuggingFaceConfig(NamedTuple):
    """The table of a config.json."""

    folder: Path
    table: Mapping[str, Any]

    def number(self, key: str, default: Any = None) -> Any:
        """Value of a key that must be a number, where it is given.

        Raises:
            UserError: it is missing and has no default, or is none.
        """
        value = self.table.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            lacks = f"lacks {key}" if value is None else f"has {key}={value!r}, which is no number"
            raise UserError(f"{self.folder}: config.json {lacks}")
        return value

    def chosen(self, key: str, allowed: Mapping[str, FeedForwardKind], default: str) -> FeedForwardKind:
        """Our name of a value of theirs."""
        value = self.table.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.refusal(key, value, " or ".join(allowed))
        return allowed[value]

    def require(self, key: str, *allowed: object) -> None:
        """Refuse a key that is there with another value than these."""
        if key in self.table and self.table[key] not in allowed:
            raise self.refusal(key, self.table[key], " or ".join(map(_shown, allowed)))

    def refusal(self, key: str, value: object, allowed: str) -> UserError:
        """One line that names key, value and what could be read."""
        return UserError(
            f"{self.folder}: config.json has {key}={_shown(value)}, which no model here has; use {allowed}"
        )

    def refuse_what_we_never_compute(self) -> None:
        """Quantized weights, experts, soft caps, cross-attention.

        Raises:
            UserError: naming key and value.
        """
        for key, absent in _NOWHERE.items():
            if key in self.table and self.table[key] not in absent:
                shown = "a table" if isinstance(self.table[key], dict) else _shown(self.table[key])
                raise UserError(f"{self.folder}: config.json has {key}={shown}, which no model here has")


def _shown(value: object) -> str:
    return json.dumps(value, default=str)


def read_config(folder: Path) -> HuggingFaceConfig:
    """The config.json of a folder.

    Raises:
        UserError: it is not there or is not JSON.
    """
    path = folder / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a Hugging Face folder: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no table; fetch it again")
    return HuggingFaceConfig(folder, table)


def rope_of(config: HuggingFaceConfig) -> dict[str, Any]:
    """Our keys for the rotary positions: `rope_theta` and `rope_scaling`."""
    table = config.table
    rope = dict(table.get("rope_scaling") or {}) | dict(table.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or table.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise config.refusal("rope_parameters.rope_type", kind, '"default" or "llama3"')
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise config.refusal("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "1")
    if kind == "default":
        return {"rope_theta": float(theta)}
    names = {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_tokens": "original_max_position_embeddings",
    }
    given = HuggingFaceConfig(config.folder, rope)
    return {"rope_theta": float(theta), "rope_scaling": {ours: given.number(name) for ours, name in names.items()}}


def global_every_of(config: HuggingFaceConfig, layer_types: list[str]) -> tuple[bool, int | None]:
    """Whether any layer sees a window only, and `global_every` where some do not."""
    if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise config.refusal("layer_types", sorted(unknown), '"full_attention" and "sliding_attention"')
    is_global = [kind == "full_attention" for kind in layer_types]
    if all(is_global):
        return False, None
    if not any(is_global):
        return True, None
    for every in range(2, len(is_global) + 1):
        if is_global == [layer % every == 0 for layer in range(len(is_global))]:
            return True, every
    raise config.refusal("layer_types", layer_types, "full attention in the first and every so-manieth layer")
