"""Which class of `transformers` computes the same as a model of ours, known before training.

A mapping of names only: imports neither torch nor transformers, so that a plan on a login node can tell.
"""

from __future__ import annotations

from llm_dist.config import Model


def hugging_face_class(model: Model) -> str | None:
    """Class that a checkpoint of this model exports to; None where none computes the same."""
    if why_not_exportable(model):
        return None
    if model.family == "gpt2":
        return "GPT2LMHeadModel"
    return "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"


def why_not_exportable(model: Model) -> str | None:
    """The key that no class of `transformers` knows in this family, and what it would have to be."""
    if model.family == "llama":
        if model.positions != "rotary":
            return f'model.positions={model.positions} with model.family=llama; exports with "rotary"'
        return None
    if model.positions == "rotary":
        return 'model.positions=rotary with model.family=gpt2; exports with "learned" or "sinusoidal"'
    if model.num_kv_heads != model.heads:
        return f"model.kv_heads={model.kv_heads} with model.family=gpt2; exports with model.heads={model.heads} of them"
    if model.qk_norm:
        return "model.qk_norm=true with model.family=gpt2; exports with false"
    return None
