"""The tensors of safetensors files, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from wrapq.errors import ModelError, reading


class Shards(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, as one mapping.

    Each is read into memory of its own when it is asked for. No file is mapped, since what is read of a mapped file
    counts as memory of the process for as long as the file is open.

    Args:
        files: the files, which must not change while this is used; of a tensor that two of them hold, the last counts.

    Raises:
        ModelError: a file cannot be read, or is another one when a tensor is asked for.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._holds: dict[str, tuple[Path, Any, str]] = {}
        self._versions: dict[Path, object] = {}
        for path in files:
            with reading(f"{path} cannot be read", ModelError):
                self._versions[path] = _version(path)
                file = safe_open(path, framework="pt", backend="pread")
                names: list[str] = file.keys()
            self._holds |= {name: (path, file, name) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        path, file, known = self._holds[name]
        with reading(f"{path}: {known} cannot be read", ModelError):
            tensor, changed = file.get_tensor(known), _version(path) != self._versions[path]
        if changed:
            raise ModelError(f"{path} was changed while it was being read: what was read before is of another file")
        return tensor

    def layout(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and the type of a tensor, as the header of its file says them."""
        path, file, known = self._holds[name]
        with reading(f"{path}: {known} cannot be read", ModelError):
            held = file.get_slice(known)
            return tuple(held.get_shape()), held.get_dtype()

    def __iter__(self) -> Iterator[str]:
        return iter(self._holds)

    def __len__(self) -> int:
        return len(self._holds)

    def renamed(self, names: Mapping[str, str]) -> Shards:
        """The same tensors under other names: for each new one that it has here."""
        other = Shards(())
        other._holds = {name: self._holds[known] for name, known in names.items()}
        other._versions = self._versions
        return other


def _version(path: Path) -> object:
    facts = path.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
