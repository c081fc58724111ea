"""Places that are not there, are full, or never end: one message with what can be done, and the status of its kind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests import forked
from tests.faults.test_bad_files import refused

NOBODY = "~no_such_user/x"


def started(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A command in a process that is started as a shell does."""
    command = [sys.executable, "-c", "from wrapq.cli import main; main()", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)  # type: ignore[call-overload]


# --- standard streams


@pytest.mark.parametrize("command", [("--help",), ("run", "--help"), ("--version",), ("presets",), ("schema",)])
def test_a_full_standard_output(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        refused(started(*command, stdout=full), 5, "a disk is full: that of standard output; free some room")


def test_a_closed_standard_output() -> None:
    done = started("presets", preexec_fn=lambda: os.close(1))
    refused(done, 5, "standard output is closed: send it to a file, or to /dev/null")


@pytest.mark.parametrize("command", [("presets",), ("plan", "recipe=w8a16")])
def test_nobody_who_reads_is_no_error(command: tuple[str, ...]) -> None:
    broken = "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1)"
    anew = "sys.stdout = open(1, 'w', closefd=False)"  # not a file's, which could seek
    program = f"{broken}; {anew}; sys.argv = {['wrapq', *command]}; from wrapq.cli import main; main()"
    done = forked.wrapq(["-c", program])
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_streams_are_nothing_to_a_run(model: Path, words: list[str], tmp_path: Path) -> None:
    """What it opens must not get their numbers: libraries write to them."""
    close = "import os, sys; os.close(0); os.close(2); sys.stderr = None"
    command = ["wrapq", "run", "recipe=w8a16", *words, f"model.path={model}", f"paths.outputs={tmp_path / 'out'}"]
    held = "import os; os._exit(sum(os.readlink(f'/proc/self/fd/{n}') != '/dev/null' for n in (0, 2)))"
    program = f"{close}; sys.argv = {command}\nfrom wrapq.cli import main\nmain(standalone_mode=False); {held}"
    assert forked.wrapq(["-c", program]).returncode == 0
    assert len(list(tmp_path.glob("out/w8a16/*/manifest.json"))) == 1


# --- folders


@pytest.mark.parametrize("command", [("presets",), ("plan", "recipe=w8a16"), ("cache",)])
def test_a_working_directory_that_is_gone(command: tuple[str, ...], tmp_path: Path) -> None:
    gone = f"import os; os.rmdir({str(tmp_path)!r})"
    program = f"{gone}; import sys; sys.argv = {['wrapq', *command]}; from wrapq.cli import main; main()"
    refused(forked.wrapq(["-c", program], tmp_path), 5, "the working directory is gone: change to one that exists")


@pytest.mark.parametrize(
    "command",
    [
        *(("plan", f"{key}='{NOBODY}'") for key in ("paths.outputs", "paths.cache", "model.path", "recipe")),
        ("plan", "recipe=w8a8_static", "calibration=text", f"calibration.path='{NOBODY}'"),
        ("plan", "evaluation=datasets", f"evaluation.path='{NOBODY}'"),
        ("run", "tracking=none", f"model.tokenizer='{NOBODY}'", "paths.outputs={out}"),
        ("evaluate", NOBODY),
        ("export", NOBODY, "export=compressed_tensors"),
        ("export", "{run}", "export=compressed_tensors", "--to", NOBODY),
        ("verify", NOBODY),
        ("verify", f"{NOBODY}.yaml"),
        ("compare", NOBODY),
        ("diff", NOBODY, "w8a16"),
        ("recipe", "from-run", NOBODY),
        ("recipe", "from-run", "{run}", "-o", NOBODY),
        ("sync", NOBODY),
        ("cache", f"paths.cache='{NOBODY}'"),
        ("ui", f"paths.outputs='{NOBODY}'"),
        ("presets", "--config-dir", NOBODY),
    ],
    ids=" ".join,
)
def test_the_home_of_nobody(command: tuple[str, ...], finished: Path, tmp_path: Path) -> None:
    done = forked.wrapq([word.format(run=finished, out=tmp_path / "out") for word in command], tmp_path)
    refused(done, 2, rf"no path: '{NOBODY}.*' \(Could not determine home directory")
    assert not (tmp_path / NOBODY.partition("/")[0]).exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("command", ["plan", "evaluate"])
def test_a_pipe_in_a_model(command: str, name: str, model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    done = forked.wrapq([command, *([str(tmp_path)] if command == "evaluate" else [f"model.path={tmp_path}"])])
    message = (
        "holds no config.json" if name == "config.json" else f"{name} is no file, but a device, a pipe or a socket"
    )
    refused(done, 2 if name == "config.json" else 4, message)


@pytest.mark.parametrize("place", ["/dev/zero", "{pipe}"])
@pytest.mark.parametrize(
    "command",
    [
        ("plan", "model.path={}"),
        ("plan", "recipe={}"),
        ("plan", "recipe=w8a8_static", "calibration=text", "calibration.path={}"),
        ("verify", "{}"),
        ("verify", "{}.yaml"),
        ("evaluate", "{}"),
        ("recipe", "from-run", "{}.yaml"),
    ],
    ids=" ".join,
)
def test_what_never_ends_is_not_read(command: tuple[str, ...], place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "place").symlink_to(place.format(pipe=tmp_path / "pipe"))
    (tmp_path / "place.yaml").symlink_to(tmp_path / "place")
    done = forked.wrapq([word.format(tmp_path / "place") for word in command], tmp_path)
    assert done.returncode in (2, 4) and done.stderr.startswith("error: "), done.stderr
    assert "defect" not in done.stderr and str(tmp_path) in done.stderr


# --- temporary files and memory


@pytest.mark.slow
def test_no_room_for_temporary_files(finished: Path, small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    full = small_disk(1)
    (full / "ballast").write_bytes(bytes(500_000))
    program = f"import os, tempfile; tempfile.tempdir = os.environ['TMPDIR'] = {str(full)!r}; import sys"
    command = ["wrapq", "export", str(finished), "export=compressed_tensors", "--to", str(tmp_path / "to")]
    done = forked.wrapq(["-c", f"{program}; sys.argv = {command}; from wrapq.cli import main; main()"])
    refused(done, 5, f"cannot write {full}: .*No space left on device; TMPDIR names another folder for temporary files")


@pytest.mark.parametrize("what", ["a batch", "a line"])
def test_memory_that_does_not_suffice(what: str, model: Path, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "long.txt").touch()
    os.truncate(tmp_path / "long.txt", 20 << 30)
    limit = "import resource as r; size = int(open('/proc/self/statm').read().split()[0]) * r.getpagesize()"
    command = ["wrapq", "run", "recipe=w8a8_static", *words, f"paths.outputs={tmp_path / 'out'}"]
    batch = ["calibration.seq_len=256", "calibration.batch_size=2000", "calibration.samples=2000"]
    line = [f"model.path={model}", "calibration=text", f"calibration.path={tmp_path / 'long.txt'}"]
    command += batch if what == "a batch" else line  # all of a batch of the shipped model is much more than the limit
    program = f"{limit}; r.setrlimit(r.RLIMIT_AS, (size + {300 << 20},) * 2); import sys; sys.argv = {command}"
    done = forked.wrapq(["-c", f"{program}; from wrapq.cli import main; main()"])
    refused(done, 7, "the memory does not suffice .*runtime.load=streaming")


@pytest.mark.parametrize("device", ["cuda NVIDIA H200", "mps", "abacus", "threads", ""])
def test_a_lock_of_another_machine(device: str, finished: Path, tmp_path: Path) -> None:
    """It is compared within the bands; only a lock that names no machine is none."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    lock = yaml.safe_load((run / "recipe.lock.yaml").read_text()) | {"device": device}
    (run / "recipe.lock.yaml").write_text(yaml.safe_dump(lock, sort_keys=False))
    done = forked.wrapq(["verify", str(run), "tracking=none", f"paths.outputs={tmp_path / 'out'}"])
    if device:
        assert done.returncode == 0 and device in done.stdout, done.stdout + done.stderr
    else:
        refused(done, 4, "recipe.lock.yaml is no lock of a run: device: ")
