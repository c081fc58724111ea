"""What earlier walks gathered, as far as it is what this one would gather.

In the `parallel` schedule a statistic depends on the float model and the data alone, so that all recipes share it. In
the `sequential` one it also depends on everything decided before, and its scope carries the digest of that.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from wrapq.errors import OutputError
from wrapq.statistics.cholesky import Factor, factorize
from wrapq.statistics.store import Store

_LEAST = 512
"""Columns of a Hessian whose factor is kept. Reading takes a sixth of the time of factorizing, writing half of it; with
fewer columns neither takes long."""


class CachedPoint(NamedTuple):
    """What the statistics of a point are known by.

    Attributes:
        where: the point's full name.
        finalized_by: its spec and algorithms, as JSON: what the points after it depend on.
        kinds: what is stored for it, by part. Each part is by itself, so that algorithms that need other ones share it.
    """

    where: str
    finalized_by: object
    kinds: Mapping[str, str]


class StoreUse:
    """A store as one run reads and writes it.

    Args:
        store: where tensors are kept.

    Attributes:
        hits: how often the store had what was asked for: the statistics of a point, the outputs on a batch.
        misses: how often it did not.
        seconds: what computing the former took when it was done.
        problem: why nothing more is written, or None.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.hits = self.misses = 0
        self.seconds = 0.0
        self.problem: str | None = None

    def write(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str], seconds: float) -> int:
        """Store `tensors`, which took so many seconds, with `facts`; returns the bytes written.

        Never raises: a store that cannot be written costs later runs time, not this one its result.
        """
        try:
            return 0 if self.problem else self.store.put(key, tensors, {"seconds": f"{seconds:.6f}", **facts})
        except OutputError as error:
            self.problem = str(error)
            return 0

    def tidy(self) -> str | None:
        """Remove what is beyond the store's limit; returns `problem`, or why that cannot be done. Never raises."""
        try:
            self.store.collect()
        except OutputError as error:
            self.problem = self.problem or str(error)
        return self.problem


class StatisticsCache(StoreUse):
    """A store of statistics, as one walk sees it.

    Attributes:
        root: digests of all that every statistic of the walk depends on: model, data, code, versions, device class.
        read: the points, by full name, whose statistics came from the store.
    """

    def __init__(self, store: Store, root: Mapping[str, str]) -> None:
        super().__init__(store)
        self.root = root
        self.read: set[str] = set()
        self._written = 0
        self._scopes: dict[str, str] = {}
        self._kinds: dict[str, Mapping[str, str]] = {}
        self._owners: WeakKeyDictionary[object, str] = WeakKeyDictionary()

    def begin(self, groups: Sequence[Sequence[CachedPoint]], shared: bool) -> None:
        """Learn what is to be finalized: all points, in the `groups` that are one after the other, unless their
        statistics are `shared`, which depend on nothing finalized before, as in the `parallel` schedule."""
        scope = digest("parallel" if shared else "sequential", self.root)
        for group in groups:
            scope = scope if shared else digest(scope, [(point.where, point.finalized_by) for point in group])
            for point in group:
                self._scopes[point.where], self._kinds[point.where] = scope, point.kinds

    def get(self, points: Sequence[str]) -> dict[str, tuple[str, dict[str, dict[str, Tensor]]]] | None:
        """For each of `points` the one that first brought what is stored for it, and that, part by part; None if one
        lacks anything. The tensors come with the first of the points that share them."""
        found: dict[str, tuple[str, dict[str, dict[str, Tensor]]]] = {}
        seconds = 0.0
        for where in points:
            parts, owners = {}, set()
            for part, kind in self._kinds[where].items():
                if (stored := self.store.get(self._key(where, kind))) is None:
                    return None
                owners.add(stored.facts.get("same_as", where))
                seconds += float(stored.facts["seconds"])
                parts[part] = stored.tensors
            owner = owners.pop()
            if owners or (owner != where and owner not in found):
                return None
            found[where] = owner, parts
        self.hits, self.seconds = self.hits + len(found), self.seconds + seconds
        self.read |= set(found)
        return found

    def put(self, where: str, gathered: object, parts: Mapping[str, Mapping[str, Tensor]], seconds: float) -> None:
        """Store the `parts` of what was `gathered` for a point; points that share it bring the same object."""
        self.misses += 1
        owner, kinds = self.owner(where, gathered), self._kinds[where]
        for part, kind in kinds.items():
            facts = {} if owner == where else {"same_as": owner}
            self._put(where, kind, parts[part] if owner == where else {}, seconds / len(kinds), facts)

    def owner(self, where: str, gathered: object) -> str:
        """The point that first brought what was `gathered` for this one."""
        return self._owners.setdefault(gathered, where)

    def factorize(self, where: str, hessian: Tensor, damp: float, act_order: bool) -> Factor | None:
        """`cholesky.factorize` for the `hessian` [K, K] that a point brought, beside which its factors are kept; not on
        a GPU, which is faster than a disk."""
        if hessian.device.type != "cpu" or len(hessian) < _LEAST:
            return factorize(hessian, damp, act_order)
        kind = f"factor of {self._kinds[where]['hessian']}, damp {damp!r}, act_order {act_order}"
        if (stored := self.store.get(self._key(where, kind))) is not None:
            self.seconds += float(stored.facts["seconds"])
            upper, order = stored.tensors["upper"].clone(), stored.tensors.get("order")  # in memory of torch's own
            return Factor(upper, order, stored.tensors["dead"], float(stored.facts["damp"]))
        start = time.perf_counter()
        if (factor := factorize(hessian, damp, act_order)) is not None:
            tensors = {"upper": factor.upper, "dead": factor.dead}
            tensors |= {} if factor.order is None else {"order": factor.order}
            self._put(where, kind, tensors, time.perf_counter() - start, {"damp": repr(factor.damp)})
        return factor

    def _put(
        self, where: str, kind: str, tensors: Mapping[str, Tensor], seconds: float, more: Mapping[str, str]
    ) -> None:
        self._written += self.write(self._key(where, kind), tensors, {"point": where, "kind": kind, **more}, seconds)
        if self._written > self.store.limit:
            limit = f"{self.store.limit / 1e9:g} GB (runtime.cache_gb)"
            self.problem = f"the statistics of this run are more than {limit}"

    def _key(self, where: str, kind: str) -> str:
        return digest(self._scopes[where], [where, kind])


def digest(before: str, data: object) -> str:
    """SHA-256, in hex, of `data`, as JSON, on top of another digest."""
    return hashlib.sha256(f"{before}{json.dumps(data, sort_keys=True, default=str)}".encode()).hexdigest()
