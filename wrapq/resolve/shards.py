"""The tensors of safetensors files, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wrapq.errors import ModelError


class Shards(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, as one mapping.

    Each is read into memory of its own when it is asked for. No file is mapped, since what is read of a mapped file
    counts as memory of the process for as long as the file is open.

    Args:
        files: the files; of a tensor that two of them hold, the last one counts.

    Raises:
        ModelError: a file cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._holds: dict[str, tuple[Path, Any]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt", backend="pread")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read: {error}") from error
            self._holds |= dict.fromkeys(file.keys(), (path, file))

    def __getitem__(self, name: str) -> Tensor:
        path, file = self._holds[name]
        try:
            return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {name} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._holds)

    def __len__(self) -> int:
        return len(self._holds)


class Renamed(Mapping[str, Tensor]):
    """The tensors of `weights` under other names.

    Args:
        weights: the tensors.
        names: for each new name the one in `weights`.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.weights, self.names = weights, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
