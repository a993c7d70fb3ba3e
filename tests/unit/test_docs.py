"""The pages against the code: links lead somewhere, and what they name is there."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from launcher.cli import app as launch_app
from llm_dist import config
from llm_dist.cli import app
from tests.pages import PAGES, README, ROOT, blocks, prose

CHANGES = ROOT / "CHANGELOG.md"
ALL = [*PAGES, CHANGES]

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("llm_dist", "launcher", "tests", "configs", "docs", "benchmarks", "requirements", ".ci")
MENTIONED_PATH = re.compile(rf"^(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*(?:::\w+)?$")
SECTIONS = "|".join(config.Config.model_fields)
KEY = re.compile(rf"^(?:{SECTIONS})\.(?!py$|json$|md$)\w+")
OVERRIDE = re.compile(rf"(?<=\s)((?:{SECTIONS})\.\w+)=")
COMMAND = re.compile(r"\b(llm-dist|llm-launch)((?: [a-z]+)*)")


def each_page() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)


def slugs(page: Path) -> set[str]:
    """Anchors that a renderer gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_listed() -> None:
    assert sorted(PAGES) == sorted([README, *(ROOT / "docs").glob("*.md")])
    linked = {target.partition("#")[0] for target in LINK.findall(README.read_text())}
    assert {str(page.relative_to(ROOT)) for page in ALL if page != README} <= linked


@each_page()
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        assert "://" not in target, f"{target}: nothing proves that it still stands; name it in words"
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        assert not anchor or anchor in slugs(file), target


@each_page()
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    for word in CODE.findall(prose(page)):
        if not MENTIONED_PATH.match(word):
            continue
        name, _, test = word.partition("::")
        assert (ROOT / name).exists(), word
        assert not test or f"def {test}(" in (ROOT / name).read_text(), word


@each_page()
def test_keys_that_are_named_exist(page: Path) -> None:
    words = {match[0] for word in CODE.findall(prose(page)) if (match := KEY.match(word))}
    overrides = {key for block in blocks(page) for key in OVERRIDE.findall(block.text)}
    assert sorted((words | overrides) - config.fields().keys()) == []


def command_names(group: typer.Typer, prefix: str = "") -> Iterator[str]:
    for each in group.registered_commands:
        assert each.callback is not None
        yield f"{prefix}{each.name or each.callback.__name__}"
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield str(inner.name)
        yield from command_names(inner.typer_instance, f"{inner.name} ")


@cache
def known_commands() -> dict[str, set[str]]:
    return {"llm-dist": set(command_names(app)), "llm-launch": set(command_names(launch_app))}


@each_page()
def test_commands_that_are_named_exist(page: Path) -> None:
    words = [*CODE.findall(prose(page)), *(block.text for block in blocks(page))]
    for program, rest in (match for word in words for match in COMMAND.findall(word)):
        names = rest.split()
        assert not names or names[0] in known_commands()[program], f"{program}{rest}"
        if names and f"{names[0]} " in "".join(known_commands()[program]):
            assert len(names) == 1 or " ".join(names[:2]) in known_commands()[program], f"{program}{rest}"


def test_every_command_is_in_the_readme() -> None:
    table = README.read_text().partition("## Commands")[2].partition("## Words")[0]
    for program, names in known_commands().items():
        for name in names - {"data", "tokenizer", "slurm-data"}:
            assert re.search(rf"`(?:{program} )?(?:{name}|{name.split()[-1]})`", table), f"{program} {name}"


def test_blocks_are_run_or_say_why_not() -> None:
    for page in ALL:
        for block in blocks(page):
            where = f"{page.name}, line {block.line}"
            assert block.language in ("sh", ""), f"{where}: only shell blocks and drawings are proved"
            if block.language != "sh":
                assert block.why_not_run is None, where
                assert not COMMAND.match(block.text.lstrip("$ ")), f"{where}: a command in a block that is not run"
            assert block.why_not_run is None or len(block.why_not_run) > 10, f"{where}: give the reason"


def test_the_run_file_of_the_pages_is_whole() -> None:
    page = next(page for page in PAGES if page.stem == "getting-started")
    text = next(block.text for block in blocks(page) if "tiny.toml <<'END'" in block.text)
    run = config.parse(tomllib.loads(text.partition("<<'END'\n")[2].partition("END\n")[0]))
    assert (run.data.sequence_tokens, run.run.seed) == (64, 0), "data.md computes its order"
    assert run.batch.tokens_per_step == 16 * 64


def test_the_page_of_keys_is_what_the_code_says() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert made == (ROOT / "docs" / "configuration.md").read_text(), "run python docs/generate.py"
    rows = re.findall(r"^\| `(\w+\.\w+)` \|", made, re.MULTILINE)
    assert rows == list(config.fields())
    assert not [row for row in made.splitlines() if row.startswith("| `") and row.endswith("|  |")], "no docstring"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 200


def test_the_picture_is_one() -> None:
    assert (ROOT / "docs" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
