"""Small labelled files, and runs that learn from them in seconds."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.commands import llm_dist

RUN_FILE = """
[run]
name = "{name}"
dir = "{folder}/runs"
steps = {steps}
seed = 3

[model]
family = "{family}"
layers = 1
d_model = 32
heads = 2
d_ff = 64
max_sequence_tokens = 64

[objective]
name = "{objective}"

[data]
train = "{train}"
holdout = "{holdout}"
tokenizer = "{tokenizer}"
cache = "{folder}/cache"
sequence_tokens = 64

[batch]
tokens_per_step = 1024
sequences_per_micro_batch = 16

[optim]
lr = 1e-2
warmup_steps = 1

[engine]
precision = "fp32"
compile = "off"

[log]
sinks = []
"""

TOPICS = {
    "sport": ("the team won the game", "a player scored", "the match ended", "their coach lost the game"),
    "food": ("the soup tastes good", "a cook bakes bread", "the cheese is old", "their bread tastes of salt"),
    "law": ("the court heard the case", "a judge ruled", "the law was changed", "their case reached the court"),
}
PLACES, PEOPLE = ("Paris", "New York", "Berlin"), ("Anna Bell", "John", "Mary Ann")


def classified(path: Path, repeats: int) -> Path:
    """Texts with a topic; a few of them have the wrong one."""
    lines = ["text\tlabel"]
    for number in range(repeats):
        for topic, texts in TOPICS.items():
            wrong = number % 5 == 4 and topic == "law"
            lines.append(f"{texts[number % 4]} {'again ' * (number % 3)}\t{'food' if wrong else topic}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tagged(path: Path, repeats: int) -> Path:
    """Sentences with people and places."""
    lines = []
    for number in range(repeats):
        place, person = PLACES[number % 3].split(), PEOPLE[number // 3 % 3].split()
        for words, kind in ((person, "PER"), (["went"], ""), (["to"], ""), (place, "LOC"), (["."], "")):
            for position, word in enumerate(words):
                lines.append(f"{word}\t{('B-' if position == 0 else 'I-') + kind if kind else 'O'}")
        lines.append("")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def trained(
    folder: Path,
    tokenizer: Path,
    files: tuple[Path, Path],
    objective: str,
    name: str,
    steps: int,
    family: str = "modernbert",
) -> Path:
    """The folder of a finished run that learnt from the first of `files` and was validated on the second."""
    run_file = folder / f"{name}.toml"
    keys = {"name": name, "folder": folder, "steps": steps, "objective": objective, "family": family}
    run_file.write_text(
        RUN_FILE.format(train=files[0], holdout=files[1], tokenizer=tokenizer, **keys), encoding="utf-8"
    )
    said = llm_dist("train", run_file)
    assert said.code == 0, said.err
    return folder / "runs" / name
