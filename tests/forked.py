"""The command line in a process of its own that has everything imported already.

Importing torch and transformers takes longer than most commands do. A forked process differs from a started one in
nothing that a command can see; what is about starting, signals or two versions of the code starts a real one. What the
child would import again and again is imported by the parent first, once.
"""

from __future__ import annotations

import atexit
import importlib
import io
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

TIMEOUT = 240


@cache
def prepare() -> None:
    """Import what commands import: all of wrapq, the tables of the terminal, and the demo model's code."""
    import wrapq

    for module in pkgutil.walk_packages(wrapq.__path__, "wrapq."):
        if not module.name.startswith(("wrapq.__main__", "wrapq.examples")):
            importlib.import_module(module.name)
    for name in ("rich.console", "rich.table", "rich.progress", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)


def start(arguments: Sequence[str], folder: Path, outputs: Sequence[Path]) -> BaseProcess:
    """`wrapq ARGUMENTS` in `folder`, its standard output and error in the files `outputs`."""
    import torch

    prepare()
    # CUDA that is in use does not survive a fork
    process = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork").Process(
        target=_main, args=(arguments, folder, outputs)
    )
    process.start()
    return process


def wrapq(arguments: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The finished `wrapq ARGUMENTS`, as `subprocess.run` gives it."""
    with TemporaryDirectory() as scratch:
        outputs = [Path(scratch, "out"), Path(scratch, "err")]
        process = start(arguments, folder or Path.cwd(), outputs)
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), TIMEOUT)
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in outputs]
        return subprocess.CompletedProcess(["wrapq", *arguments], process.exitcode, *texts)


def _main(arguments: Sequence[str], folder: Path, outputs: Sequence[Path]) -> None:
    """What `start` runs; after `-c` the next argument is a program, as it is to Python, and no command of wrapq's."""
    import torch

    from wrapq.cli import main

    # a fork leaves torch without its pool of threads, and two threads that both make it anew, as when weights are read,
    # may meet an assertion of torch's
    torch.set_num_threads(torch.get_num_threads())
    atexit._clear()
    os.chdir(folder)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    code = 0
    sys.argv = ["wrapq", *arguments]
    try:
        if arguments[0] == "-c":
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
