"""A store of statistics that belongs to somebody else, is full, damaged or no folder at all costs time, never a run."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.faults.runs import arguments, digests, wait
from wrapq.errors import OutputError
from wrapq.statistics.store import Store

KEYS = [letter * 64 for letter in "abcdef"]
NOBODY, OTHER, GROUP = 65534, 65533, 65532
NOT_KEPT = "note: nothing more is kept for later runs: "


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may read and write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)
        for path in Path(folder).rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o777)


def becoming(user: int, group: int = GROUP) -> str:
    """A program that gives up the rights of root, where it has them."""
    return f"import os; os.geteuid() or (os.setgroups([]), os.setgid({group}), os.setuid({user}))\n"


# Root keeps its files, as any owner does, and no longer reads or writes past their modes; unlike another user it still
# reaches an environment that is installed in a private folder.
UNPRIVILEGED = (
    "import ctypes, os; drop = ctypes.CDLL(None, use_errno=True).capset\n"
    "assert os.geteuid() or not drop((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())\n"
)


def all_of(folder: Path, folders: int, files: int) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(folders if path.is_dir() else files)


def read_only(store: Path, filled: Path) -> None:
    shutil.copytree(filled, store)
    all_of(store, 0o555, 0o444)


def read_only_and_damaged(store: Path, filled: Path) -> None:
    shutil.copytree(filled, store)
    for path in store.glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    all_of(store, 0o555, 0o444)


def read_only_and_empty(store: Path, filled: Path) -> None:
    store.mkdir(mode=0o555)


def private(store: Path, filled: Path) -> None:
    shutil.copytree(filled, store)
    all_of(store, 0o000, 0o600)


def a_file(store: Path, filled: Path) -> None:
    store.write_text("")


def in_a_file(store: Path, filled: Path) -> None:
    store.parent.rmdir()
    store.parent.write_text("")


def where_none_can_be_made(store: Path, filled: Path) -> None:
    store.parent.chmod(0o555)


KEEP, REMOVE = "cannot keep statistics in {}: ", "cannot remove statistics from {}: "


@pytest.mark.parametrize(
    ("make", "gigabytes", "read", "problem"),
    [
        (read_only, 1, "56 of 56", None),
        pytest.param(read_only, 1e-6, "56 of 56", REMOVE + "Permission denied", marks=pytest.mark.slow),
        (private, 1, None, KEEP + "Permission denied"),
        pytest.param(read_only_and_damaged, 1, None, KEEP + "Permission denied", marks=pytest.mark.slow),
        pytest.param(read_only_and_empty, 1, None, KEEP + "Permission denied", marks=pytest.mark.slow),
        pytest.param(a_file, 1, None, KEEP + "File exists", marks=pytest.mark.slow),
        pytest.param(in_a_file, 1, None, KEEP + "Not a directory", marks=pytest.mark.slow),
        pytest.param(where_none_can_be_made, 1, None, KEEP + "Permission denied", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_it_ends_as_one_without(
    make: Callable[[Path, Path], None],
    gigabytes: float,
    read: str | None,
    problem: str | None,
    public: Path,
    undisturbed_outputs: Path,
    undisturbed: dict[str, str],
) -> None:
    store = public / "above" / "store"
    store.parent.mkdir()
    make(store, undisturbed_outputs / "cache")
    (public / "out").mkdir()
    (public / "out").chmod(0o777)
    words = [*arguments(public / "out"), f"paths.cache={store}", f"runtime.cache_gb={gigabytes}"]
    done = forked.wrapq(["-c", f"{UNPRIVILEGED}from wrapq.cli import main; main({words})"], public)
    assert done.returncode == 0, done.stderr
    assert digests(public / "out") == [undisturbed]
    said = " ".join(done.stdout.split())
    assert said.count(NOT_KEPT) == bool(problem) and (not problem or NOT_KEPT + problem.format(store) in said)
    assert (f"note: statistics of {read} points read from {store}" in said) == bool(read)


@pytest.mark.slow
def test_a_run_with_a_full_one_ends_as_one_without(small_disk, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    store = small_disk(1)
    (store / "large").write_bytes(bytes(2**20 - 2**16))
    done = forked.wrapq([*arguments(tmp_path / "out"), f"paths.cache={store}"])
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == [undisturbed]
    assert f"{NOT_KEPT}{KEEP.format(store)}No space left on device" in " ".join(done.stdout.split())


def put(store: Store, key: str) -> None:
    store.put(key, {"x": torch.arange(1000.0)}, {})


def test_the_command_says_what_it_cannot_clear(public: Path, undisturbed_outputs: Path) -> None:
    read_only(public / "store", undisturbed_outputs / "cache")
    words = ["cache", "--clear", f"paths.cache={public / 'store'}"]
    done = forked.wrapq(["-c", f"{UNPRIVILEGED}from wrapq.cli import main; main({words})"], public)
    assert done.returncode == 5 and REMOVE.format(public / "store") in done.stderr


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o770, 0o775, 0o777])
def test_what_is_in_a_store_has_the_rights_of_its_folder(mode: int, public: Path) -> None:
    folder = public / "store"
    folder.mkdir()
    folder.chmod(mode)
    before = os.umask(0o077)
    try:
        store = Store(folder, 0)
        put(store, KEYS[0])
        (entry,) = store.entries()
        assert (entry.path.parent.stat().st_mode & 0o777, entry.path.stat().st_mode & 0o777) == (mode, mode & 0o666)
        store.collect()
        assert (folder / ".lock").stat().st_mode & 0o777 == mode & 0o666
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two other users")
@pytest.mark.parametrize("mode", [0o770, 0o2770])
def test_two_users_of_a_group_share_a_store(mode: int, public: Path) -> None:
    """Each reads what the other put, adds to it, and removes it."""
    folder = public / "store"
    folder.mkdir()
    os.chown(folder, NOBODY, GROUP)
    folder.chmod(mode)
    for user, number in ((NOBODY, 1), (OTHER, 2), (NOBODY, 3)):
        program = (
            f"{becoming(user)}os.umask(0o077)\n"
            "from pathlib import Path; from tests.faults.test_foreign_stores import KEYS, put\n"
            f"from wrapq.statistics.store import Store; store = Store(Path({str(folder)!r}), 1e9)\n"
            f"assert all(store.get(key) for key in KEYS[:{number - 1}])\n"
            f"put(store, KEYS[{number - 1}]); assert store.collect(0)[0] == {number}\n"
            f"for key in KEYS[:{number}]: put(store, key)\n"
        )
        done = forked.wrapq(["-c", program], public)
        assert done.returncode == 0, done.stderr


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    store = Store(tmp_path, 1e9)
    put(store, KEYS[0])
    (entry,) = store.entries()
    left = [entry.path.with_name(f"tmp{name}") for name in ("now_here", "before_1")]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[1], (0, 0))
    assert store.collect() == (0, 0) and [path.exists() for path in left] == [True, False]
    assert store.get(KEYS[0])


@pytest.mark.parametrize(
    "name", ["llama/model.safetensors", "aa/model.safetensors", "work/tmp_notes.txt", "aa/tmp.csv"]
)
def test_what_is_no_entry_is_left_alone(name: str, tmp_path: Path) -> None:
    """As where `paths.cache` names a folder with models."""
    put(Store(tmp_path, 1e9), KEYS[0])
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_bytes(b"theirs")
    os.utime(theirs, (0, 0))
    done = forked.wrapq(["cache", "--clear", f"paths.cache={tmp_path}"])
    assert done.returncode == 0 and done.stdout.startswith("removed 1 statistics") and theirs.read_bytes() == b"theirs"


def test_a_pipe_that_is_named_like_an_entry_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path, 1e9)
    put(store, KEYS[0])
    (entry,) = store.entries()
    pipe = entry.path.with_name(f"{entry.path.name.split('.')[0]}.{'0' * 64}.safetensors")
    os.mkfifo(pipe)
    done = forked.wrapq(["cache", f"paths.cache={tmp_path}"])
    assert done.returncode == 0 and list(store.entries()) == [entry]


def test_a_lock_that_another_has_is_not_waited_for_without_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("wrapq.statistics.store._PATIENCE", 0.1)
    store = Store(tmp_path, 0)
    put(store, KEYS[0])
    program = (
        f"import time; from filelock import FileLock; lock = FileLock({str(tmp_path / '.lock')!r}); lock.acquire()\n"
        f"open({str(tmp_path / 'held')!r}, 'w').close(); time.sleep(600)"
    )
    holder = forked.start(["-c", program], tmp_path, [tmp_path / "said", tmp_path / "errors"])
    wait((tmp_path / "held").exists, 60)
    try:
        with pytest.raises(OutputError, match="cannot remove statistics from"):
            store.collect()
    finally:
        holder.kill()
        holder.join()
    assert store.collect()[0] == 1


@pytest.mark.parametrize("cleared", ["by the command", "by the store"])
def test_collection_beside_readers_costs_them_time_only(cleared: str, tmp_path: Path) -> None:
    """A reader finds whole entries or none, computes anew what is gone or was damaged, and never dies."""
    program = (
        "from pathlib import Path; from tests.faults.test_foreign_stores import read_until; "
        f"read_until(Path({str(tmp_path / 'store')!r}), Path({str(tmp_path / 'stop')!r}))"
    )
    outputs = [[tmp_path / f"said-{number}", tmp_path / f"errors-{number}"] for number in range(2)]
    readers = [forked.start(["-c", program], tmp_path, each) for each in outputs]
    wait(lambda: all(each[0].exists() and "ready" in each[0].read_text() for each in outputs), 60)
    ends, removed = time.monotonic() + 2, 0
    while time.monotonic() < ends:
        for entry in Store(tmp_path / "store", 1e9).entries():
            with suppress(FileNotFoundError):  # a reader removed it as damaged
                os.truncate(entry.path, entry.size // 2)
        if cleared == "by the store":
            removed += Store(tmp_path / "store", 1e9).collect(0)[0]
        else:
            done = forked.wrapq(["cache", "--clear", f"paths.cache={tmp_path / 'store'}"])
            assert done.returncode == 0, done.stderr
            removed += int(done.stdout.split()[1])
    (tmp_path / "stop").touch()
    for reader, (said, errors) in zip(readers, outputs, strict=True):
        reader.join(60)
        assert reader.exitcode == 0, errors.read_text()
        hits, misses = map(int, said.read_text().split()[-2:])
        assert hits and misses > len(KEYS), said.read_text()
    assert removed > len(KEYS)


def read_until(folder: Path, stop: Path) -> None:
    """Read entries, computing those that are not there, until there is a file `stop`; prints how many were and not."""
    store, found = Store(folder, 1e9), [0, 0]
    print("ready")
    while not stop.exists():
        for key in KEYS:
            stored = store.get(key)
            found[stored is None] += 1
            if stored is None:
                put(store, key)
            else:
                assert torch.equal(stored.tensors["x"], torch.arange(1000.0))
    print(*found)
