from __future__ import annotations

import pytest

from llm_dist.errors import UserError
from llm_dist.prompts import read_prompts


def test_a_prompt_per_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("one \r\n\n two é\x85\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["one ", " two é\x85"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\ntwo", "n": 1}\n\n{"prompt": ""}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one\ntwo", ""]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "a", "must end in .txt"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.txt", None, "No such file"),
        ("a.jsonl", '{"prompt": "a"}\n{', "line 2: is not JSON"),
        ("a.jsonl", '\n{"text": "a"}', "line 2: must be an object"),
        ("a.jsonl", '{"prompt": 1}', "line 1: must be an object"),
        ("a.jsonl", "[1]", "line 1: must be an object"),
    ],
)
def test_what_is_no_file_of_prompts_is_one_line(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as raised:
        read_prompts(tmp_path / name)
    assert "\n" not in str(raised.value)
