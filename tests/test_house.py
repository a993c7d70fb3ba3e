"""The house stands as DESIGN.md draws it; and the checks see what they are there to see."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import house

ROOT = Path(__file__).parents[1]
HOUSE = house.read(ROOT, "llm_dist", "launcher")
EVERYTHING = [*HOUSE, *house.read(ROOT, "benchmarks", "tests")]
NOT_BUILT_YET = {"curate"}

Check = Callable[[list[house.Module]], list[str]]


@pytest.mark.parametrize("check", [house.floor_breaches, house.circles, house.vendor_breaches, house.rank_breaches])
def test_rooms_know_only_what_they_may(check: Check) -> None:
    found = check(HOUSE)
    assert not found, "\n".join(found)


def test_every_objective_trains_in_the_one_loop() -> None:
    found = house.loop_breaches(HOUSE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("check", [house.size_breaches, house.name_breaches])
def test_files_keep_to_their_sizes_and_names(check: Check) -> None:
    found = check(EVERYTHING)
    assert not found, "\n".join(found)


def test_torch_free_rooms_load_no_torch() -> None:
    found = house.torch_breaches(ROOT, HOUSE)
    assert not found, "\n".join(found)


def test_every_room_on_the_floors_stands() -> None:
    drawn = {room for rooms in house.FLOORS for room in rooms}
    standing = {module.room for module in HOUSE if module.tree.body}
    assert drawn - standing == NOT_BUILT_YET, "strike what is built from NOT_BUILT_YET, and what is gone from FLOORS"


def test_every_torch_free_name_stands() -> None:
    names = {module.name for module in HOUSE}
    missing = {name for name in house.TORCH_FREE if name not in names}
    assert missing == {f"llm_dist.{room}" for room in NOT_BUILT_YET} & set(house.TORCH_FREE)


BREACHES = [
    (house.loop_breaches, "llm_dist/finetune.py", "def run(e):\n    e.train_step([], 1, 0.1, 0)", "there is one loop"),
    (house.loop_breaches, "llm_dist/train/session.py", "loss.backward()", "loss.backward trains"),
    (house.loop_breaches, "llm_dist/finetune.py", "self.optimizer.step()", "self.optimizer.step trains"),
    (house.floor_breaches, "llm_dist/config.py", "from llm_dist.engine import plain", "config (floor 2)"),
    (house.floor_breaches, "llm_dist/config.py", "def late():\n    from llm_dist import cli", "llm_dist.cli"),
    (house.floor_breaches, "llm_dist/config.py", "import llm_dist.runtime", "llm_dist.runtime"),
    (house.floor_breaches, "llm_dist/data/index.py", "from ..generate import sample", "llm_dist.generate.sample"),
    (house.floor_breaches, "llm_dist/engine/plain.py", "import llm_dist.model.layers", "llm_dist.model.layers"),
    (house.floor_breaches, "llm_dist/engine/plain.py", "from llm_dist.data import loader", "llm_dist.data.loader"),
    (house.floor_breaches, "llm_dist/model/layers.py", "from llm_dist import runtime", "llm_dist.runtime"),
    (house.floor_breaches, "llm_dist/cli.py", "from launcher import local", "launcher.local"),
    (house.floor_breaches, "launcher/local.py", "import_module('llm_dist.train.loop')", "llm_dist.train.loop"),
    (house.floor_breaches, "llm_dist/cli.py", "import llm_dist.__main__", "llm_dist.__main__"),
    (house.floor_breaches, "llm_dist/cli.py", "from tests import house", "tests.house"),
    (house.floor_breaches, "llm_dist/attic.py", "", "'attic' stands on no floor"),
    (house.floor_breaches, "llm_dist/attic/box.py", "", "'attic' stands on no floor"),
    (house.vendor_breaches, "llm_dist/train/loop.py", "import deepspeed", "import deepspeed"),
    (house.vendor_breaches, "llm_dist/train/loop.py", "from accelerate.utils import x", "import accelerate"),
    (house.vendor_breaches, "llm_dist/engine/plain.py", "from torch.distributed import fsdp", "torch.distributed.fsdp"),
    (house.vendor_breaches, "llm_dist/train/build.py", "f = torch.distributed.fsdp.fully_shard", "fsdp"),
    (house.vendor_breaches, "llm_dist/tokenizer.py", "import transformers", "llm_dist.exchange"),
    (house.rank_breaches, "llm_dist/data/loader.py", "rank = os.environ['RANK']", "runtime reads RANK"),
    (house.rank_breaches, "llm_dist/metrics.py", "name = 'LOCAL_RANK'\nrank = os.getenv(name)", "LOCAL_RANK"),
    (house.rank_breaches, "launcher/local.py", "ranks = int(os.environ.get('WORLD_SIZE', 1))", "WORLD_SIZE"),
    (house.rank_breaches, "launcher/local.py", "inside = 'RANK' in os.environ", "RANK"),
    (house.rank_breaches, "launcher/local.py", "rank = environment['RANK']", "RANK"),
    (house.size_breaches, "llm_dist/data/__init__.py", "from llm_dist.data.index import open_shards", "is empty"),
    (house.size_breaches, "llm_dist/cli.py", "x = 1\n" * 501, "501 lines"),
    (house.size_breaches, "llm_dist/cli.py", "class A:\n    def f():\n" + "        x = 1\n" * 80, "f has 81 lines"),
    (house.name_breaches, "llm_dist/data/utils.py", "", "'utils'"),
    (house.name_breaches, "llm_dist/helpers/data.py", "", "'helpers'"),
    (house.name_breaches, "llm_dist/data/shard_manager.py", "", "'manager'"),
    (house.name_breaches, "llm_dist/data/shards.py", "class ShardManager: ...", "class ShardManager"),
]


@pytest.mark.parametrize(("check", "file", "source", "named"), BREACHES)
def test_a_planted_breach_is_found_and_named(check: Check, file: str, source: str, named: str, tmp_path: Path) -> None:
    plant(tmp_path, file, source)
    (found,) = check(house.read(tmp_path, "llm_dist", "launcher"))
    assert found.startswith(file)
    assert named in found


SOUND = [
    (house.floor_breaches, "llm_dist/__main__.py", "from llm_dist.cli import main"),
    (house.floor_breaches, "llm_dist/data/index.py", "from llm_dist.data import order\nfrom llm_dist import config"),
    (house.floor_breaches, "llm_dist/tokenizer_training.py", "from llm_dist import tokenizer"),
    (house.floor_breaches, "launcher/local.py", "import torchrun\nfrom llm_dist.config import load"),
    (house.vendor_breaches, "llm_dist/engine/zero.py", "import deepspeed.runtime"),
    (house.vendor_breaches, "llm_dist/exchange/folder.py", "from transformers import AutoModel"),
    (house.rank_breaches, "llm_dist/runtime.py", "rank = os.environ['RANK']"),
    (house.rank_breaches, "launcher/local.py", "environment = {'RANK': '0'}\nenvironment['LOCAL_RANK'] = '0'"),
    (house.size_breaches, "llm_dist/data/__init__.py", ""),
]


@pytest.mark.parametrize(("check", "file", "source"), SOUND)
def test_what_is_allowed_is_no_breach(check: Check, file: str, source: str, tmp_path: Path) -> None:
    plant(tmp_path, file, source)
    assert not check(house.read(tmp_path, "llm_dist", "launcher"))


def test_a_circle_inside_a_room_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "llm_dist/data/one.py", "from llm_dist.data.two import two")
    plant(tmp_path, "llm_dist/data/two.py", "from llm_dist.data import three")
    modules = house.read(tmp_path, "llm_dist")
    assert not house.circles(modules)
    plant(tmp_path, "llm_dist/data/three.py", "def late():\n    from . import one")
    (found,) = house.circles(house.read(tmp_path, "llm_dist"))
    assert all(f"llm_dist.data.{name}" in found for name in ("one", "two", "three"))


def test_each_room_that_loads_torch_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "torch.py", "")
    plant(tmp_path, "llm_dist/batch.py", "import torch")
    plant(tmp_path, "llm_dist/errors.py", "")
    plant(tmp_path, "llm_dist/plan.py", "import llm_dist.batch")
    plant(tmp_path, "llm_dist/model/size.py", "def late():\n    import torch")
    plant(tmp_path, "launcher/local.py", "import llm_dist.plan")
    found = house.torch_breaches(tmp_path, house.read(tmp_path, "llm_dist", "launcher"))
    assert [breach.split()[0] for breach in found] == ["llm_dist.plan", "launcher.local"]


def test_a_torch_free_room_that_cannot_be_imported_is_a_breach(tmp_path: Path) -> None:
    plant(tmp_path, "llm_dist/errors.py", "import nothing_of_this_name")
    (found,) = house.torch_breaches(tmp_path, house.read(tmp_path, "llm_dist"))
    assert "nothing_of_this_name" in found


def plant(root: Path, file: str, source: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source)
