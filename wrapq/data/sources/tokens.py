"""Token ids that were made before: an integer matrix in a `.safetensors` or `.npy` file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from wrapq.data.sources.base import SOURCES, TokenSource
from wrapq.data.sources.files import check_readable, find_files
from wrapq.errors import CalibrationError, nearest, reading
from wrapq.registry import Options

if TYPE_CHECKING:
    from torch import Tensor


class TokensOptions(Options):
    """Options of the source `tokens`."""

    path: str = Field(description="a .safetensors or .npy file")
    tensor: str | None = Field(default=None, description="which tensor of a .safetensors file with several")


@SOURCES.register("tokens")
class Tokens(TokenSource):
    """Rows of token ids [S, L], or one row [L]. Pickled files (`.pt`, object arrays) are never read."""

    Options = TokensOptions
    options: TokensOptions

    def check(self) -> None:
        """Refuse a missing file, one of another kind, and one that holds no integer matrix."""
        file = self._file()
        check_readable([file])
        self._read(file)  # both formats are mapped: this reads the header

    def describe(self) -> str:
        return f"tokens:{self.options.path}"

    def token_rows(self) -> Iterator[Tensor]:
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
            what = "expected a matrix [samples, length] of token ids, found shape"
            raise CalibrationError(f"data file '{file}': {what} {list(ids.shape)}")
        return ids if ids.dim() == 2 else ids[None]  # [L] -> [1, L]

    def _read_npy(self, file: Path) -> Tensor:
        import numpy as np
        import torch

        with reading(f"data file '{file}' cannot be read as .npy", CalibrationError):
            array = np.load(file, mmap_mode="c", allow_pickle=False)  # copy-on-write: torch wants a writable array
            if not isinstance(array, np.ndarray):
                raise ValueError("it is an .npz archive: save the matrix by itself, with numpy.save")
            native = array.view() if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
            return torch.from_numpy(native)

    def _read_safetensors(self, file: Path) -> Tensor:
        from safetensors import safe_open

        failure = f"data file '{file}' cannot be read as safetensors"
        with reading(failure, CalibrationError), safe_open(file, framework="pt") as opened:
            return opened.get_tensor(self._tensor_name(file, list(opened.keys())))

    def _tensor_name(self, file: Path, names: list[str]) -> str:
        wanted = self.options.tensor or ("input_ids" if "input_ids" in names else None)
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted in names:
            return str(wanted)
        what = f"no tensor {wanted!r}" if wanted else "several tensors: say which with the option 'tensor'"
        raise CalibrationError(f"data file '{file}': {what}; it holds: {', '.join(nearest(wanted or '', names))}")
