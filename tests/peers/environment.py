"""The peer's own environment: its libraries and wrapq's want different versions of the same packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PEER, INTERPRETER = "llmcompressor==0.14.0.1", "WRAPQ_PEER_PYTHON"
NNCF = ("nncf==3.4.0", "openvino==2026.4.1")
JOBS, ONESHOT, STATIC, OPENVINO = (
    Path(__file__).with_name(f"{name}.py") for name in ("jobs", "oneshot", "static", "openvino_models")
)


def peer_python(folder: Path, also: Sequence[str] = ()) -> Path:
    """The interpreter named by `WRAPQ_PEER_PYTHON`, or that of a virtual environment made in `folder` for the peer, and
    for the packages `also`."""
    if given := os.environ.get(INTERPRETER):
        return Path(given)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PEER, *also], check=True)
    return python


def beside(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of a virtual environment made in `folder` that has what this one has, and `packages`, which want
    other versions of something or change what other packages do.

    Raises:
        subprocess.CalledProcessError: they cannot be installed.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    Path(site.strip(), "beside.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    run([str(python), "-m", "pip", "install", "-q", *packages])
    return python


def run(command: Sequence[str]) -> str:
    """What a command says that ends well."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_oneshots(
    python: Path, jobs: Sequence[dict[str, Any]], folder: Path, script: Path = ONESHOT
) -> Iterator[dict[str, Any]]:
    """Run `jobs` (see the `script`) in one process of the peer, and give each answer as it comes.

    Raises:
        RuntimeError: the process ended before its last answer, with the end of what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked, said = folder / "jobs.json", folder / "peer.log"
    asked.write_text(json.dumps(list(jobs)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    answers = 0
    command = [str(python), "-P", str(JOBS), str(script), str(asked)]
    with (
        said.open("w+") as log,
        subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True) as peer,
    ):
        for line in peer.stdout or ():
            if line.startswith("RESULT "):
                answers += 1
                yield json.loads(line.removeprefix("RESULT "))
    if answers < len(jobs):
        raise RuntimeError(f"the peer stopped after {answers} of {len(jobs)} jobs:\n{said.read_text()[-3000:]}")
