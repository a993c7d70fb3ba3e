"""`llm-dist generate` of many prompts."""

from __future__ import annotations

import json

import pytest

from tests.e2e.commands import llm_dist

pytestmark = pytest.mark.e2e


def test_a_file_of_prompts_gives_what_each_gives_alone(finished, tmp_path):
    texts = ["Return the", "A", "The list of"]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = ("--max-tokens", "8", "--min-p", "0.01", "--repetition-penalty", "1.2")
    found = llm_dist("generate", finished, "--prompts", tmp_path / "p.txt", *options, "--json", "--seed", "4")
    records = [json.loads(line) for line in found.out.splitlines()]
    for number, (text, record) in enumerate(zip(texts, records, strict=True)):
        alone = llm_dist("generate", finished, "--prompt", text, *options, "--json", "--seed", 4 + number).json
        assert record == {"prompt": text, "text": alone["text"], "tokens": alone["tokens"]}
    words = ("generate", finished, "--prompts", tmp_path / "p.jsonl", *options, "--seed", "4", "--batch", "2")
    blocks = [f"--- {number} ---\n{r['prompt']}{r['text']}\n" for number, r in enumerate(records, start=1)]
    assert llm_dist(*words).out == "".join(blocks)


def test_what_cannot_be_gone_on_from_is_one_line(finished, tmp_path):
    (tmp_path / "p.txt").write_text("a\n" + "word " * 100 + "\n")
    many = ("generate", finished, "--prompts", tmp_path / "p.txt")
    assert "prompt 2: the prompt is" in llm_dist(*many).mistake
    assert "either --prompt or --prompts" in llm_dist(*many, "--prompt", "a").mistake
    assert "min_p=2" in llm_dist("generate", finished, "--min-p", "2").mistake
    assert "repetition_penalty=0" in llm_dist("generate", finished, "--repetition-penalty", "0").mistake
    assert "No such file" in llm_dist("generate", finished, "--prompts", tmp_path / "none.txt").mistake


def test_attention_is_drawn(finished, tmp_path):
    words = ("attention", finished, "--text", "Return the list", "--out")
    drawn = llm_dist(*words, tmp_path / "a.png", "--json").json
    assert drawn["maps"] == 2 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert llm_dist(*words, tmp_path / "a.html", "--layer", "1", "--head", "all", "--json").json["maps"] == 2
    page = (tmp_path / "a.html").read_text()
    assert '"layer 1, head 1"' in page and '\\u003c|endoftext|>"' in page and '" the"' in page


def test_what_cannot_be_drawn_is_one_line(finished, tmp_path):
    words = ("attention", finished, "--out", tmp_path / "a.png", "--text")
    assert "layers 0 to 1" in llm_dist(*words, "a", "--layer", "2").mistake
    assert "0 to 1" in llm_dist(*words, "a", "--head", "2").mistake
    assert "max_sequence_tokens=64" in llm_dist(*words, "word " * 100).mistake
    assert "holds no token" in llm_dist(*words, "").mistake
    assert "must end in" in llm_dist("attention", finished, "--text", "a", "--out", tmp_path / "a.gif").mistake
