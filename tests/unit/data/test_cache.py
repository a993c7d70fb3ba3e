"""The cache keeps its bound whoever shares it, and whatever vanishes from it is only fetched again."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.data.cache import _RECOUNT, _UNFINISHED, BlockCache
from llm_dist.errors import UserError

WRITE = """
import random, sys
from pathlib import Path
from llm_dist.data.cache import BlockCache
folder, name, max_bytes, size, count = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
cache = BlockCache(Path(folder), max_bytes)
print("ready", flush=True)
for number in range(count):
    cache.write(f"{name}-{number}", random.randbytes(size))
"""


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def write_elsewhere(folder: Path, name: str, max_bytes: int, size: int, count: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WRITE, folder, name, max_bytes, size, count]
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 1000)
    assert cache.read("a") is None
    cache.write("a", b"0123456789")
    cache.write("b", memoryview(b"xyz"))
    assert (cache.read("a"), cache.read("a", 3, 4), cache.read("b")) == (b"0123456789", b"3456", b"xyz")
    assert BlockCache(tmp_path / "blocks", 1000).read("b") == b"xyz"
    assert (cache.touch("a"), cache.touch("c")) == (True, False)
    cache.write("a", b"anew")
    assert cache.read("a") == b"anew"


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    for number in range(10):
        cache.write(str(number), bytes(100))
        os.utime(cache._path(str(number)), (number, number))
    cache.touch("0")
    cache.write("10", bytes(100))
    assert [name for name in map(str, range(11)) if cache.read(name) is None] == ["1", "2"]


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 400), max_size=60), max_bytes=st.integers(400, 3000))
def test_one_process_keeps_the_bound_exactly(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], max_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = BlockCache(folder, max_bytes)
    for number, size in enumerate(sizes):
        cache.write(str(number), bytes(size))
        assert bytes_in(folder) <= max_bytes
        assert cache.read(str(number)) == bytes(size)


def test_it_is_kept_between_looks_at_the_folder_too(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 5010)
    for number in range(600):
        cache.write(str(number), bytes(10))
        assert number < 480 or bytes_in(tmp_path) <= 5010


def test_a_block_larger_than_the_cache_stands_alone(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100)
    for name in "abc":
        cache.write(name, bytes(150))
        assert (bytes_in(tmp_path), cache.read(name)) == (150, bytes(150))


def test_threads_keep_the_bound_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seen = BlockCache(tmp_path, 50_000), []
    publish = cache._publish

    def publish_and_look(path: Path, content: bytes) -> None:
        publish(path, content)
        seen.append(bytes_in(tmp_path))  # no other thread may write meanwhile

    monkeypatch.setattr(cache, "_publish", publish_and_look)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: cache.write(str(number), random.randbytes(1000)), range(200)))
    assert 45_000 < max(seen) <= 50_000


def test_processes_keep_it_but_for_what_they_have_not_seen(tmp_path: Path) -> None:
    max_bytes, size, processes = 2_000_000, 10_000, 3
    slack = (processes - 1) * (max_bytes // _RECOUNT + size)
    writing = [write_elsewhere(tmp_path, str(number), max_bytes, size, 500) for number in range(processes)]
    seen = []
    while any(process.poll() is None for process in writing):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in writing:
                process.send_signal(number)
            if number == signal.SIGSTOP:
                seen.append(bytes_in(tmp_path))
        time.sleep(0.02)
    for process in writing:
        process.communicate()
        assert process.returncode == 0
    assert 0.9 * max_bytes < max(seen) <= max_bytes + slack
    assert not list(tmp_path.rglob(f"{_UNFINISHED}*"))


def test_nothing_outlives_a_kill(tmp_path: Path) -> None:
    """What a process leaves half written counts, is not read, and goes when it is old."""
    process = write_elsewhere(tmp_path, "other", 1 << 30, 4 << 20, 100_000)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        while not (left := list(tmp_path.rglob(f"{_UNFINISHED}*"))):
            assert process.poll() is None
        os.kill(process.pid, signal.SIGSTOP)
        left = list(tmp_path.rglob(f"{_UNFINISHED}*"))
        process.kill()
    written = bytes_in(tmp_path)
    if not left:  # it finished this one before it was stopped
        left = [tmp_path / "00" / f"{_UNFINISHED}by-hand"]
        left[0].write_bytes(bytes(5))
        written += 5
    cache = BlockCache(tmp_path, 1 << 30)
    assert cache._known_bytes == written
    assert left[0].exists()
    long_ago = time.time() - 7200
    os.utime(left[0], (long_ago, long_ago))
    assert BlockCache(tmp_path, 1 << 30)._known_bytes == bytes_in(tmp_path)
    assert not left[0].exists()


def test_what_is_being_written_is_not_evicted(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    unfinished = tmp_path / "00" / f"{_UNFINISHED}by-another"
    unfinished.write_bytes(bytes(900))
    os.utime(unfinished, (time.time() - 60,) * 2)
    for name in "abcd":
        cache.write(name, bytes(400))
    assert unfinished.exists()
    assert [name for name in "abcd" if cache.read(name) is not None] == ["d"]


def test_the_folder_may_be_cleaned_meanwhile(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 1000)
    cache.write("a", bytes(500))
    shutil.rmtree(tmp_path / "blocks")
    assert (cache.read("a"), cache.touch("a")) == (None, False)
    for name in "bcd":
        cache.write(name, bytes(400))
        assert cache.read(name) == bytes(400)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlockCache(tmp_path / "blocks", 1000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    said = rf"^{tmp_path}/blocks: cannot be written \(No space left on device\); free space, lower data\.cache_gigabyte"
    with pytest.raises(UserError, match=said):
        cache.write("a", bytes(10))
    with pytest.raises(UserError, match=said):
        cache.write_beside(tmp_path / "table", bytes(10))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/blocks: cannot be written \(Not a directory\)"):
        BlockCache(tmp_path / "file" / "blocks", 1000)


def test_what_stands_beside_is_neither_counted_nor_evicted(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 100)
    cache.write_beside(tmp_path / "tables" / "deep" / "index", bytes(5000))
    for name in "abc":
        cache.write(name, bytes(90))
    assert (tmp_path / "tables" / "deep" / "index").read_bytes() == bytes(5000)
    assert bytes_in(tmp_path / "blocks") == 90
