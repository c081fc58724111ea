"""What earlier walks gathered, as far as it is what this one would gather.

In the `parallel` schedule a statistic depends on the float model and the data alone, so that all recipes share it. In
the `sequential` one it also depends on everything decided before, and its scope carries the digest of that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from wrapq.calibration.algorithm import Algorithm
from wrapq.calibration.hessian import Hessian
from wrapq.calibration.store import Store
from wrapq.errors import OutputError
from wrapq.observers.base import Observer
from wrapq.wrappers.quantizer import Quantizer


class Recall:
    """A store, as one walk sees it.

    Args:
        store: where statistics are kept.
        root: digests of all that every statistic of the walk depends on: model, data, code, versions, device class.

    Attributes:
        hits: how many points got their statistics from the store.
        misses: how many did not.
        seconds: what gathering the former took when it was done.
        problem: why nothing more is written, or None.
        recalled: the points, by full name, whose statistics came from the store.
    """

    def __init__(self, store: Store, root: Mapping[str, str]) -> None:
        self.store, self.root = store, root
        self.hits = self.misses = 0
        self.seconds = 0.0
        self.problem: str | None = None
        self.recalled: set[str] = set()
        self._written = 0
        self._scopes: dict[str, str] = {}
        self._kinds: dict[str, str] = {}
        self._keys: WeakKeyDictionary[object, str] = WeakKeyDictionary()

    def begin(self, groups: Sequence[Sequence[Quantizer]], algorithms: Mapping[str, Algorithm], shared: bool) -> None:
        """Learn what is to be decided.

        Args:
            groups: all points, in the groups that are decided one after the other.
            algorithms: the algorithm of each static point, by the point's full name.
            shared: statistics do not depend on what was decided before, as in the `parallel` schedule.
        """
        scope = digest("parallel" if shared else "sequential", self.root)
        for group in groups:
            said = [(q.where, str(q.spec), _named(algorithms.get(q.where))) for q in group]
            scope = scope if shared else digest(scope, said)
            for quantizer in group:
                self._scopes[quantizer.where] = scope
                algorithm = algorithms.get(quantizer.where)
                needs = " ".join(sorted(algorithm.needs)) if algorithm else ""
                self._kinds[quantizer.where] = needs or f"observer {quantizer.spec}"

    def load(self, points: Sequence[Quantizer]) -> dict[str, tuple[str, dict[str, Tensor]]] | None:
        """For each of `points`, by its full name, the key of what is stored for it and its tensors; None if one lacks
        it. Points that share a statistic have one key, and the tensors come with the first.
        """
        found: dict[str, tuple[str, dict[str, Tensor]]] = {}
        seconds = 0.0
        for quantizer in points:
            key = self._key(quantizer)
            if (stored := self.store.get(key)) is None:
                return None
            key = stored.facts.get("same_as", key)
            if not stored.tensors and all(key != other for other, _ in found.values()):
                return None
            seconds += float(stored.facts["seconds"])
            found[quantizer.where] = key, stored.tensors
        self.hits, self.seconds = self.hits + len(found), self.seconds + seconds
        self.recalled |= set(found)
        return found

    def keep(self, quantizer: Quantizer, gathered: Hessian | Observer, seconds: float) -> None:
        """Store what was gathered for a point; points that share it bring the same object.

        Never raises: a store that cannot be written costs later runs time, not this one its result.
        """
        self.misses += 1
        if self.problem is not None:
            return
        key, where = self._key(quantizer), quantizer.where
        facts = {"point": where, "kind": self._kinds[where], "seconds": f"{seconds:.6f}"}
        first = self._keys.setdefault(gathered, key)
        tensors = gathered.state_dict() if first == key else {}
        try:
            self._written += self.store.put(key, tensors, facts if first == key else facts | {"same_as": first})
        except OutputError as error:
            self.problem = str(error)
        if self._written > self.store.limit:
            self.problem = f"the statistics of this run are more than {self.store.limit / 1e9:g} GB (runtime.cache_gb)"

    def _key(self, quantizer: Quantizer) -> str:
        return digest(self._scopes[quantizer.where], [quantizer.where, self._kinds[quantizer.where]])


def _named(algorithm: Algorithm | None) -> object:
    return algorithm and [type(algorithm).__qualname__, algorithm.options.model_dump(mode="json")]


def digest(before: str, data: object) -> str:
    """SHA-256, in hex, of `data`, as JSON, on top of another digest."""
    return hashlib.sha256(f"{before}{json.dumps(data, sort_keys=True, default=str)}".encode()).hexdigest()
