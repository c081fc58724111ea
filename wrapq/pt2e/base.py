"""What a quantizer of PT2E is to a recipe: a name with options, from which torchao's own object is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from wrapq.registry import Configurable, Registry


class GraphQuantizer(Configurable, ABC):
    """A quantizer of PT2E, by name.

    A recipe is data and names no class to import; a package registers its own:

        @GRAPH_QUANTIZERS.register("mine")
        class Mine(GraphQuantizer):
            def make(self):
                return MyQuantizer().set_global(...)
    """

    @abstractmethod
    def make(self) -> Any:
        """A new quantizer for `prepare_pt2e`, which annotates all that it knows in the graph it is given."""


GRAPH_QUANTIZERS: Registry[type[GraphQuantizer]] = Registry("quantizer of PT2E", "wrapq.pt2e")
