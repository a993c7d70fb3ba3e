"""Files of prompts: a line of text each, or a JSON object each."""

from __future__ import annotations

import json
from pathlib import Path

from llm_dist.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """Prompts of a .txt file, one per line, or of a .jsonl file, key `prompt`; blank lines are left out.

    Raises:
        UserError: there is no such file, it holds no prompts, or a line is none.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--prompts {path}: must end in .txt (a prompt per line) or .jsonl (key prompt)")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not UTF-8 ({error.reason})"
        raise UserError(f"--prompts {path}: {reason}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path}: holds no prompts; write one per line")
    if path.suffix == ".txt":
        return [line.removesuffix("\r") for _, line in lines]
    return [_prompt_of(line, f"--prompts {path}: line {number}") for number, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error.msg}); write one object per line") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f"{where}: must be an object with the key prompt and a text")
    return str(record["prompt"])
