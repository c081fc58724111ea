"""The undo log of a rewriter: what parameters were before they were changed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class UndoLog:
    """Keeps what is changed in a model since the last `commit`, so that it can be put back to the bit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before: dict[tuple[str, str], tuple[nn.Parameter | None, Tensor | None]] = {}
        self._undo: list[Callable[[], object]] = []

    def save(self, name: str, parameter: str) -> None:
        """Keep the values of a parameter of the module `name`, which is about to be changed in place."""
        if (name, parameter) not in self._before:  # a parameter that was replaced since is dropped as a whole
            tensor = self.model.get_submodule(name)._parameters[parameter]
            self._before[name, parameter] = tensor, None if tensor is None else tensor.detach().clone()

    def replace(self, name: str, parameter: str, by: nn.Parameter) -> None:
        """Give the module `name` another parameter, or one where it had None."""
        parameters = self.model.get_submodule(name)._parameters
        self._before.setdefault((name, parameter), (parameters[parameter], None))
        parameters[parameter] = by

    def append(self, undo: Callable[[], object]) -> None:
        """Call `undo` when the model is restored, the last one first."""
        self._undo.append(undo)

    def commit(self) -> None:
        """Keep the changes so far; only later ones are undone from now on."""
        self._before.clear()
        self._undo.clear()

    def restore(self) -> None:
        """Put the model back as it was at the last `commit`."""
        for (name, parameter), (tensor, values) in self._before.items():
            if tensor is not None and values is not None:
                tensor.data.copy_(values)
            self.model.get_submodule(name)._parameters[parameter] = tensor
        for undo in reversed(self._undo):
            undo()
        self.commit()
