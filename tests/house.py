"""Reads the house's source and names what breaks its rules; imports nothing of it.

Every check takes the modules found under a root and returns one line per breach, so that it can be tried on planted
ones. What a room is: a file or folder of `llm_dist`, or all of `launcher`.
"""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FLOORS = (
    ("errors", "batch", "rows", "draws", "fingerprint", "publishing"),
    ("config", "runtime"),
    ("model", "tokenizer", "optim"),
    ("plan", "objectives", "metrics"),
    ("data", "curate", "engine", "generate", "curve", "attention_map"),
    ("checkpoint", "evaluate", "exchange", "probe"),
    ("train", "trained", "launcher"),
    ("predictions", "harness"),
    ("cli",),
    ("__main__",),
)
"""From the ground up: a room imports rooms of lower floors only. (`__main__` is cli's door, so it stands above it.)"""

SHARED_ROOMS = {
    "tokenizer_training": "tokenizer",
    "tokenizer_vocabulary": "tokenizer",
    "tokenizer_fast": "tokenizer",
    "tokenizer_import": "tokenizer",
    "tokenizer_words": "tokenizer",
    "tokenizer_chat": "tokenizer",
    "tokenizer_template": "tokenizer",
    "plan_memory": "plan",
    "cli_manners": "cli",
    "cli_scoring": "cli",
    "cli_writing": "cli",
    "prompts": "generate",
    "config_fields": "config",
    "config_lora": "config",
    "config_model": "config",
    "config_sections": "config",
    "config_resume": "config",
}
"""Files that live in the room of another file."""

NEVER = {("engine", "model"), ("engine", "data"), ("model", "runtime")}
"""What the floors would allow: (room, room it may not import). Besides, nothing imports `launcher`."""

NOT_SHIPPED = {"tests", "benchmarks"}

TORCH_FREE = (
    *(
        "launcher",
        "llm_dist.errors",
        "llm_dist.config",
        "llm_dist.plan",
        "llm_dist.plan_memory",
        "llm_dist.curate",
        "llm_dist.cli",
    ),
    *(
        "llm_dist.tokenizer",
        "llm_dist.tokenizer_training",
        "llm_dist.tokenizer_vocabulary",
        "llm_dist.tokenizer_fast",
        "llm_dist.tokenizer_import",
        "llm_dist.tokenizer_words",
        "llm_dist.tokenizer_chat",
        "llm_dist.tokenizer_template",
        "llm_dist.model.size",
        "llm_dist.model.adapter_size",
        "llm_dist.checkpoint.layout",
    ),
    *("llm_dist.rows", "llm_dist.draws", "llm_dist.data", "llm_dist.fingerprint"),
)
"""Importing these, and all that lies inside them, loads no torch."""

VENDORS = {
    "deepspeed": ("llm_dist.engine.zero",),
    "accelerate": ("llm_dist.engine.fsdp",),
    "torch.distributed.fsdp": ("llm_dist.engine.fsdp",),
    "torch.distributed._composable.fsdp": ("llm_dist.engine.fsdp",),
    "lm_eval": ("llm_dist.harness",),
    "transformers": ("llm_dist.exchange", "llm_dist.tokenizer_import"),
}
"""The only modules that may import each vendor."""

RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
SAYS_NOTHING = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

LOADS_TORCH = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(name)
"""


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str | None:
        return room_of(self.name)


def read(root: Path, *folders: str) -> list[Module]:
    """Every Python file under the `folders` of `root`."""
    return [_read(root, path) for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def _read(root: Path, path: Path) -> Module:
    relative = path.relative_to(root)
    parts = relative.with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, relative, text, ast.parse(text, str(path)))


def room_of(name: str) -> str | None:
    """Room of a dotted name; None for what lies outside the house and for `llm_dist` itself."""
    package, *inside = name.split(".")
    if package == "llm_dist":
        return SHARED_ROOMS.get(inside[0], inside[0]) if inside else None
    return package if package == "launcher" else None


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module imports, wherever in the file; `from a import b` gives `a.b`."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                base = _base(module, node)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def _base(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.path.parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def floor_breaches(modules: Iterable[Module]) -> list[str]:
    """Imports upward or sideways, against `NEVER`, and rooms that stand on no floor."""
    floor = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
    found = []
    for module in modules:
        room = module.room
        if room is None:
            continue
        if room not in floor:
            found.append(f"{module.path}: room {room!r} stands on no floor; place it in FLOORS")
            continue
        for line, name in imports(module):
            other = room_of(name)
            if other == room or (other is None and name.split(".")[0] not in NOT_SHIPPED):
                continue
            lower = other in floor and floor[other] < floor[room]
            if not lower or other == "launcher" or (room, other) in NEVER:
                found.append(f"{module.path}:{line}: {room} (floor {floor[room]}) may not import {name}")
    return found


def circles(modules: Iterable[Module]) -> list[str]:
    """The first circle of imports among `modules`, if there is one."""
    known = {module.name for module in modules if module.path.name != "__init__.py"}
    graph = {
        module.name: {target for _, name in imports(module) for target in (name, name.rpartition(".")[0])} & known
        for module in modules
        if module.name in known
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"imports run in a circle: {' <- '.join(error.args[1])}"]
    return []


def vendor_breaches(modules: Iterable[Module]) -> list[str]:
    """Vendors imported, or reached through an attribute, outside their engine."""
    found = []
    for module in modules:
        named = [*imports(module), *_dotted_attributes(module)]
        for vendor, homes in VENDORS.items():
            if any(_inside(module.name, home) for home in homes):
                continue
            lines = sorted({line for line, name in named if _inside(name, vendor)})
            found += [f"{module.path}:{line}: only {' and '.join(homes)} may import {vendor}" for line in lines]
    return found


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _dotted_attributes(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", name := ast.unparse(node)):
            yield node.lineno, name


def loop_breaches(modules: Iterable[Module]) -> list[str]:
    """A second training loop: who but the loop asks for a step, or but an engine goes backward or updates."""
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called = ast.unparse(node.func)
            is_step = called.endswith(".train_step") and module.name != "llm_dist.train.loop"
            is_update = called.endswith((".backward", "optimizer.step")) and module.room != "engine"
            if is_step or is_update:
                found.append(f"{module.path}:{node.lineno}: {called} trains; there is one loop, llm_dist/train/loop.py")
    return found


def rank_breaches(modules: Iterable[Module]) -> list[str]:
    """Rooms other than `runtime` that read a rank from the environment; `launcher` may set one."""
    found = []
    for module in modules:
        if module.room == "runtime":
            continue
        named = _names_read(module) if module.room == "launcher" else _strings(module)
        found += [f"{module.path}:{line}: only runtime reads {name}" for line, name in named if name in RANK_VARIABLES]
    return found


def _strings(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _names_read(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        match node:
            case ast.Subscript(slice=ast.Constant(value=str(name)), ctx=ast.Load()):
                yield node.lineno, name
            case ast.Call(
                func=ast.Attribute(attr="get" | "getenv" | "pop" | "setdefault") | ast.Name(id="getenv"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name
            case ast.Compare(left=ast.Constant(value=str(name)), ops=[ast.In() | ast.NotIn()]):
                yield node.lineno, name


def size_breaches(modules: Iterable[Module]) -> list[str]:
    """Files and functions that have outgrown their room, and code in an `__init__.py`."""
    found = []
    for module in modules:
        if module.path.name == "__init__.py" and module.tree.body:
            found.append(f"{module.path}: an __init__.py is empty")
        if (num_lines := len(module.text.splitlines())) > MAX_FILE_LINES:
            found.append(f"{module.path}: {num_lines} lines; a file has at most {MAX_FILE_LINES}")
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (num_lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES:
                found.append(
                    f"{module.path}:{node.lineno}: {node.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}"
                )
    return found


def name_breaches(modules: Iterable[Module]) -> list[str]:
    """Files, folders and classes whose name says nothing."""
    found = []
    for module in modules:
        words = re.split(r"[._]", module.name)
        found += [f"{module.path}: {word!r} says nothing" for word in words if word in SAYS_NOTHING]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                words = [word.lower() for word in re.findall(r"[A-Z][a-z]*", node.name)]
                found += [f"{module.path}:{node.lineno}: class {node.name}" for word in words if word in SAYS_NOTHING]
    return found


def torch_breaches(root: Path, modules: Iterable[Module]) -> list[str]:
    """Torch-free modules that load torch, found by importing them one after the other in a fresh interpreter."""
    names = [m.name for m in modules if any(_inside(m.name, free) for free in TORCH_FREE) and _safe_to_import(m)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    found: list[str] = []
    while names:
        command = [sys.executable, "-c", LOADS_TORCH, *names]
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        if not ended.returncode:
            break
        guilty = ended.stderr.strip().splitlines()[-1]
        if guilty not in names:
            return [*found, f"one of {' '.join(names)} cannot be imported: {guilty}"]
        found.append(f"{guilty} loads torch; `python -X importtime -c 'import {guilty}'` shows through what")
        names = names[names.index(guilty) + 1 :]  # the ones before it are known to be clean
    return found


def _safe_to_import(module: Module) -> bool:
    return not module.name.endswith("__main__")
