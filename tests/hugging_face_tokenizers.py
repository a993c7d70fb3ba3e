"""Tokenizers as others make them, built with `tokenizers` from a few sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and doesn't look back.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich: 1234567890!",
    "def add(a, b):\n    return a + b  # adds\n",
    "  two spaces in front, two behind  ",
    "naïve café, 東京, \U0001f600 and a\ttab",
]


def byte_level(out: Path) -> None:
    """As GPT-2 has it: one token for everything."""
    runtime = Tokenizer(models.BPE())
    runtime.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    runtime.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    runtime.train_from_iterator(TEXTS, trainer)
    end = "<|endoftext|>"
    _save(runtime, out, bos_token=end, eos_token=end, unk_token=end)


def word_piece(out: Path) -> None:
    """As BERT has it, with a template and padding that no text of ours gets."""
    runtime = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    runtime.normalizer = normalizers.BertNormalizer(lowercase=True)
    runtime.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    runtime.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    runtime.train_from_iterator(TEXTS, trainer)
    runtime.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    _save(
        runtime,
        out,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def llama(out: Path) -> None:
    """As Llama 2 has it: sentencepiece's BPE with bytes to fall back on."""
    special, pieces = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learnt.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    content = json.loads(learnt.to_str())["model"]
    tokens = [*special, *pieces, *sorted(content["vocab"], key=content["vocab"].get)]
    merges = [tuple(pair) for pair in content["merges"]]
    vocabulary = {token: id_ for id_, token in enumerate(dict.fromkeys(tokens))}
    runtime = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    runtime.normalizer = learnt.normalizer
    parts = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ]
    runtime.decoder = decoders.Sequence(parts)
    runtime.add_special_tokens(special)
    runtime.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    _save(runtime, out, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _save(runtime: Tokenizer, out: Path, **roles: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=runtime, **roles).save_pretrained(out)
