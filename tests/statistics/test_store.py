"""The store: whole entries or none, damage noticed, the least recently used collected."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from wrapq.errors import OutputError
from wrapq.statistics.store import Store

KEY, OTHER = "a" * 64, "b" * 64


def put(store: Store, key: str = KEY, size: int = 1000) -> None:
    store.put(key, {"x": torch.arange(size, dtype=torch.float32)}, {"point": "p", "seconds": "1.5"})


def file_of(store: Store, key: str = KEY) -> Path:
    (entry,) = (entry for entry in store.entries() if entry.path.name.startswith(key))
    return entry.path


def test_what_was_put_comes_back(tmp_path: Path):
    store = Store(tmp_path / "cache", 1e9)
    assert store.get(KEY) is None and list(store.entries()) == [] and store.collect() == (0, 0)
    put(store)
    found = Store(tmp_path / "cache", 1e9).get(KEY)
    assert torch.equal(found.tensors["x"], torch.arange(1000.0)) and found.facts == {"point": "p", "seconds": "1.5"}
    assert store.get(OTHER) is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage", [flip, cut, pipe, lambda p: p.write_bytes(b"")], ids=["flip", "cut", "pipe", "empty"]
)
def test_a_damaged_entry_is_missing_and_can_be_put_again(damage, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = Store(tmp_path, 1e9)
    put(store)
    damage(file_of(store))
    assert store.get(KEY) is None
    assert "is damaged: removed" in caplog.text and not list(store.entries())
    put(store)
    assert store.get(KEY) is not None


def test_the_least_recently_used_go_first(tmp_path: Path):
    store = Store(tmp_path, 3.5 * 4200)
    for index, key in enumerate("abcdef"):
        put(store, key * 64)
        os.utime(file_of(store, key * 64), (index, index))
    assert store.get("a" * 64) is not None  # used now
    assert store.collect()[0] == 3
    assert sorted(entry.path.name[0] for entry in store.entries()) == ["a", "e", "f"]
    assert store.collect(0)[0] == 3 and not list(store.entries())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path, 1e9)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OutputError, match=r"cannot keep statistics in .*: No space left"):
        put(store)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_is_really_full(small_disk: Callable[[int], Path]):
    """What is there stays readable, and no part of the entry that did not fit is left."""
    store = Store(small_disk(1) / "store", 1e9)
    put(store)
    with pytest.raises(OutputError, match=r"cannot keep statistics in .*: No space left on device"):
        store.put(OTHER, {"x": torch.zeros(2**19)}, {})
    assert store.get(KEY) is not None and store.get(OTHER) is None
    assert len([path for path in store.folder.rglob("*") if path.is_file()]) == 1


def _write_and_read(folder: Path, failures: multiprocessing.Queue) -> None:
    store = Store(folder, 30 * 4200)
    for round_ in range(20):
        for key in "abcd":
            put(store, key * 64)
            found = store.get(key * 64)
            if found is not None and not torch.equal(found.tensors["x"], torch.arange(1000.0)):
                failures.put(f"{key} in round {round_}")
        store.collect(2 * 4200)


def test_processes_at_once_see_whole_entries_or_none(tmp_path: Path):
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    failures = context.Queue()
    workers = [context.Process(target=_write_and_read, args=(tmp_path, failures)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert failures.empty()
    assert not list(tmp_path.rglob("tmp*"))


@pytest.mark.parametrize("damage", [b"\xff" * 12, save({}, {"seconds": "0.x", "kind": "it"})], ids=["file", "facts"])
def test_the_table_stands_damaged_entries(damage: bytes, tmp_path: Path):
    store = Store(tmp_path, 1e9)
    put(store)
    put(store, OTHER)
    file_of(store, OTHER).write_bytes(damage)
    assert sorted(len(entry.facts()) for entry in store.entries()) == [0, 2]
