"""Token ids that were made before: an integer matrix in a `.safetensors` or `.npy` file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from wrapq.calibration.sources.base import SOURCES, SourceOptions, TokenSource
from wrapq.calibration.sources.files import check_readable, find_files
from wrapq.errors import CalibrationError, nearest

if TYPE_CHECKING:
    from torch import Tensor


@SOURCES.register("tokens")
class Tokens(TokenSource):
    """Rows of token ids [S, L], or one row [L]. Pickled files (`.pt`, object arrays) are never read."""

    class Options(SourceOptions):
        """Options of the source `tokens`."""

        path: str = Field(description="a .safetensors or .npy file")
        tensor: str | None = Field(default=None, description="which tensor of a .safetensors file with several")

    def check(self) -> None:
        """Refuse a missing file, one of another kind, and one that holds no integer matrix."""
        file = self._file()
        check_readable([file])
        self._read(file)  # both formats are mapped: this reads the header

    def describe(self) -> str:
        """`tokens:` and the path."""
        return f"tokens:{self.options.path}"

    def token_rows(self) -> Iterator[Tensor]:
        """The rows in order, int64 [L]."""
        yield from self._read(self._file()).long()

    def _file(self) -> Path:
        file = find_files(self.options.path, (".safetensors", ".npy"))[0]
        if file.suffix not in (".safetensors", ".npy"):
            raise CalibrationError(f"data file '{file}': token ids are read from .safetensors or .npy files only")
        return file

    def _read(self, file: Path) -> Tensor:
        ids = self._read_npy(file) if file.suffix == ".npy" else self._read_safetensors(file)
        if ids.dtype.is_floating_point or ids.dtype.is_complex or str(ids.dtype) == "torch.bool":
            raise CalibrationError(f"data file '{file}': token ids must be integers, found {ids.dtype}")
        if ids.dim() not in (1, 2) or not ids.numel():
            raise CalibrationError(
                f"data file '{file}': expected a matrix [samples, length] of token ids, found shape {list(ids.shape)}"
            )
        return ids if ids.dim() == 2 else ids[None]  # [L] -> [1, L]

    def _read_npy(self, file: Path) -> Tensor:
        import numpy as np
        import torch

        try:
            array = np.load(file, mmap_mode="c", allow_pickle=False)  # copy-on-write: torch wants a writable array
            return torch.from_numpy(
                array.view() if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
            )
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise CalibrationError(f"data file '{file}' cannot be read as .npy: {error}") from None

    def _read_safetensors(self, file: Path) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(self._tensor_name(file, list(opened.keys())))
        except SafetensorError as error:
            raise CalibrationError(f"data file '{file}' cannot be read as safetensors: {error}") from None

    def _tensor_name(self, file: Path, names: list[str]) -> str:
        wanted = self.options.tensor or ("input_ids" if "input_ids" in names else None)
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted in names:
            return str(wanted)
        what = f"no tensor {wanted!r}" if wanted else "several tensors: say which with the option 'tensor'"
        raise CalibrationError(f"data file '{file}': {what}; it holds: {', '.join(nearest(wanted or '', names))}")
