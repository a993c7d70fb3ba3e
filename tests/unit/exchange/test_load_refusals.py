"""Folders of theirs that cannot be read: one line each, naming what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_dist.errors import UserError
from llm_dist.exchange.load import open_folder
from tests.unit.exchange.folders import saved, theirs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folders(case)`: made once; tests only read it."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            saved(case, made[case])
        return made[case]

    return folder


def copied(source: Path, out: Path, **keys: Any) -> Path:
    """The folder with other keys in its config.json; ... takes a key out."""
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return out


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


CONFIGS = [
    ("llama", {"model_type": "mamba"}, "model_type=mamba, which is unknown here; known are llama, qwen2"),
    ("llama", {"model_type": ..., "architectures": ["NewModel"]}, "architectures=['NewModel'] and no model_type"),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 'rope_parameters.rope_type="yarn"'),
    ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type="linear"'),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "config.json lacks factor"),
    ("llama", {"attention_bias": True}, "attention_bias=true"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=a table"),
    ("llama", {"hidden_size": ...}, "config.json lacks hidden_size"),
    ("llama", {"hidden_size": "wide"}, "hidden_size='wide'"),
    ("llama", {"num_key_value_heads": 3}, "must be a multiple of model.kv_heads=3"),
    ("llama", {"vocab_size": ...}, "config.json lacks vocab_size"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        'layer_types=["sliding_attention", "full_attention"]',
    ),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear_attention"] * 2}, "linear"),
    ("qwen3", {"attention_bias": True}, "attention_bias=true"),
    ("gpt2", {"activation_function": "silu"}, 'activation_function="silu"'),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
    ("bert", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key"'),
    ("bert", {"is_decoder": True}, "is_decoder=true"),
    ("roberta", {"hidden_act": "relu"}, 'hidden_act="relu"'),
    ("modernbert", {"mlp_bias": True}, "mlp_bias=true"),
    ("modernbert", {"decoder_bias": False}, "decoder_bias=false"),
    ("modernbert", {"classifier_activation": "silu"}, 'classifier_activation="silu"'),
]


@pytest.mark.parametrize(("case", "keys", "said"), CONFIGS)
def test_a_key_that_we_do_not_compute_is_named(case, keys, said, folders, tmp_path):
    assert said in refusal(copied(folders(case), tmp_path / "hf", **keys))


def test_files_that_are_missing_or_damaged_are_named(folders, tmp_path):
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(tmp_path)
    folder = copied(folders("llama"), tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(b"not one")
    assert "model.safetensors is damaged" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "save_pretrained(folder, safe_serialization=True)" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path):
    theirs("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    assert f"lacks 1 of {len(shards)} weight files" in refusal(tmp_path)
    assert shards[1].name in refusal(tmp_path)
    shards[1].write_bytes(shards[0].read_bytes())
    assert f"{shards[1].name} does not hold" in refusal(tmp_path)
    shards[1].write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert "index.json is damaged" in refusal(tmp_path)


def test_tensors_that_do_not_fit_are_named(folders, tmp_path):
    folder = copied(folders("llama"), tmp_path / "hf")
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def refused(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, file)
        return refusal(folder)

    key, value = "model.layers.1.mlp.up_proj.weight", tensors["model.layers.1.mlp.up_proj.weight"]
    assert f"lacks 1 of the tensors that its config.json means, first {key}" in refused(
        {name: tensor for name, tensor in tensors.items() if name != key}
    )
    assert f"{key} has shape [48, 31], but config.json means [48, 32]" in refused(
        tensors | {key: value[:, :31].contiguous()}
    )
    assert "first lm_head.weight" in refused(
        {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    )
    norm = "model.layers.0.self_attn.q_norm.weight"
    assert f"tensor {norm} belongs to no Llama model" in refused(tensors | {norm: torch.ones(8)})
    save_file(tensors | {key: value.to(torch.int8)}, file)
    with pytest.raises(UserError, match=r"is torch\.int8; only fp32, bf16 and fp16"):
        open_folder(folder).parameter("blocks.1.feed_forward.up.weight")
