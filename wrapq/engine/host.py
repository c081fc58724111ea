"""The host process of a run: device, threads and seed, restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from wrapq.calibration.processes import Processes
from wrapq.errors import ModelError
from wrapq.half_products import fast_half_products
from wrapq.recipe.schema import Settings


def find_device(settings: Settings, processes: Processes | None = None) -> torch.device:
    """The device of the settings, under `torchrun` a GPU of its own for each process; raises `ModelError` where this
    machine does not have it."""
    name = settings.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if (count := getattr(torch, kind).device_count()) <= int(index or 0):
        found = f"{count} {kind.upper()} device{'s' * (count > 1)}" if count else f"no {kind.upper()} device"
        raise ModelError(f"runtime.device={settings.runtime.device}: this machine has {found}; use cpu or auto")
    if name == "cuda" and processes is not None and processes.count > 1:
        if processes.local_rank >= count:
            raise ModelError(
                f"process {processes.local_rank} of this machine has no GPU to itself: there are {count}; "
                "start as many as there are, or say runtime.device=cpu"
            )
        name = f"cuda:{processes.local_rank}"
    return torch.device(name)


@contextmanager
def use_machine(settings: Settings, seed: int, processes: Processes | None = None) -> Iterator[torch.device]:
    """Set the seed and the number of threads, use `fast_half_products`, and yield `find_device(settings, processes)`.

    On exit the number of threads and the random states are restored: the process may belong to somebody else.
    """
    device = find_device(settings, processes)
    with _preserved(), fast_half_products():
        if settings.runtime.threads:
            torch.set_num_threads(settings.runtime.threads)
        torch.manual_seed(seed)
        if device.index is not None and processes is not None and processes.count > 1:
            torch.cuda.set_device(device)
        yield device


@contextmanager
def _preserved() -> Iterator[None]:
    """Restore the number of threads and the random states of torch, numpy and Python on exit."""
    threads, seed = torch.get_num_threads(), torch.initial_seed()
    in_torch, in_numpy, in_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(in_torch)
        np.random.set_state(in_numpy)
        random.setstate(in_python)
        if on_gpus is None:  # none was in use, and the first would have begun with the seed of the CPU
            torch.cuda.manual_seed_all(seed)
        else:
            torch.cuda.set_rng_state_all(on_gpus)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
