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

from wrapq.calibration.algorithm import Algorithm, Rounded
from wrapq.calibration.statistics import PRECISIONS, InputStatistics
from wrapq.calibration.store import Store
from wrapq.errors import OutputError
from wrapq.observers.base import Observer
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
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
        rounded: how many weights were found rounded, as a recipe of the same sweep left them for the others.
        left: how many were left so.
    """

    def __init__(self, store: Store, root: Mapping[str, str]) -> None:
        self.store, self.root = store, root
        self.hits = self.misses = self.rounded = 0
        self.left = 0
        self.seconds = 0.0
        self.problem: str | None = None
        self.recalled: set[str] = set()
        self._written = 0
        self._scopes: dict[str, str] = {}
        self._kinds: dict[str, dict[str, str]] = {}
        self._owners: WeakKeyDictionary[object, str] = WeakKeyDictionary()

    def begin(
        self, groups: Sequence[Sequence[Quantizer]], algorithms: Mapping[str, Sequence[Algorithm]], shared: bool
    ) -> None:
        """Learn what is to be decided.

        Args:
            groups: all points, in the groups that are decided one after the other.
            algorithms: the algorithms of each static point, by the point's full name.
            shared: statistics do not depend on what was decided before, as in the `parallel` schedule.
        """
        scope = digest("parallel" if shared else "sequential", self.root)
        for group in groups:
            said = [(q.where, str(q.spec), [_named(a) for a in algorithms.get(q.where, ())]) for q in group]
            scope = scope if shared else digest(scope, said)
            for quantizer in group:
                self._scopes[quantizer.where] = scope
                needs = frozenset(need for a in algorithms.get(quantizer.where, ()) for need in a.needs)
                self._kinds[quantizer.where] = _kinds(quantizer, needs)

    def load(self, points: Sequence[Quantizer]) -> dict[str, tuple[str, dict[str, dict[str, Tensor]]]] | None:
        """For each of `points`, by its full name, the point that first brought what is stored for it, and that, part by
        part; None if one lacks anything. The tensors come with the first of the points that share them.
        """
        found: dict[str, tuple[str, dict[str, dict[str, Tensor]]]] = {}
        seconds = 0.0
        for quantizer in points:
            parts, owners = {}, set()
            for part, kind in self._kinds[quantizer.where].items():
                if (stored := self.store.get(self._key(quantizer.where, kind))) is None:
                    return None
                owners.add(stored.facts.get("same_as", quantizer.where))
                seconds += float(stored.facts["seconds"])
                parts[part] = stored.tensors
            owner = owners.pop()
            if owners or (owner != quantizer.where and owner not in found):
                return None
            found[quantizer.where] = owner, parts
        self.hits, self.seconds = self.hits + len(found), self.seconds + seconds
        self.recalled |= set(found)
        return found

    def keep(self, quantizer: Quantizer, gathered: InputStatistics | Observer, seconds: float) -> None:
        """Store what was gathered for a point; points that share it bring the same object.

        Never raises: a store that cannot be written costs later runs time, not this one its result.
        """
        self.misses += 1
        where, kinds = quantizer.where, self._kinds[quantizer.where]
        owner = self._owners.setdefault(gathered, where)
        held = gathered.parts() if isinstance(gathered, InputStatistics) else {"observer": gathered.state_dict()}
        for part, kind in kinds.items():
            if self.problem is not None:
                return
            facts = {"point": where, "kind": kind, "seconds": f"{seconds / len(kinds):.6f}"}
            facts |= {} if owner == where else {"same_as": owner}
            self._put(self._key(where, kind), held[part] if owner == where else {}, facts)

    def load_rounded(self, weights: Mapping[str, tuple[Algorithm, QuantSpec]]) -> dict[str, Rounded]:
        """Weights as another recipe's run rounded them, with all that is to be reported of them; none unless all are
        there.

        Args:
            weights: what rounds each of them, and to what, by the point's full name.
        """
        found: dict[str, Rounded] = {}
        seconds = 0.0
        for where, (rounder, spec) in weights.items():
            if (stored := self.store.get(self._key(where, _rounded(rounder, spec)))) is None:
                return {}
            codes = stored.tensors.pop("integers")
            found[where] = Rounded(codes, QParams(spec, **stored.tensors), json.loads(stored.facts["report"]))
            seconds += float(stored.facts["seconds"])
        self.rounded, self.seconds = self.rounded + len(found), self.seconds + seconds
        return found

    def keep_rounded(self, where: str, rounder: Algorithm, spec: QuantSpec, rounded: Rounded, seconds: float) -> None:
        """Store a weight rounded to another recipe's spec, with all that is to be reported of it; never raises."""
        self.left += 1
        if self.problem is None:
            tensors = {"integers": rounded.integers, "scale": rounded.qparams.scale}
            if rounded.qparams.zero_point is not None:
                tensors["zero_point"] = rounded.qparams.zero_point
            report = json.dumps(dict(rounded.report))
            facts = {"point": where, "kind": f"rounded {spec}", "seconds": f"{seconds:.6f}", "report": report}
            self._put(self._key(where, _rounded(rounder, spec)), tensors, facts)

    def _put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        try:
            self._written += self.store.put(key, tensors, facts)
        except OutputError as error:
            self.problem = str(error)
        if self._written > self.store.limit:
            limit = f"{self.store.limit / 1e9:g} GB (runtime.cache_gb)"
            self.problem = f"the statistics of this run are more than {limit}"

    def _key(self, where: str, kind: object) -> str:
        return digest(self._scopes[where], [where, kind])


def _kinds(quantizer: Quantizer, needs: frozenset[str]) -> dict[str, str]:
    """What is stored for a point, each part by itself so that algorithms which need other ones share it."""
    precision = " ".join(["", *sorted(needs & PRECISIONS)])
    parts = {part: f"{part}{precision}" for part in sorted(needs - PRECISIONS)}
    return parts or {"observer": f"observer {quantizer.spec}"}


def _rounded(rounder: Algorithm, spec: QuantSpec) -> object:
    return ["rounded", _named(rounder), str(spec)]


def _named(algorithm: Algorithm) -> object:
    kind = type(algorithm)
    return [f"{kind.__module__}.{kind.__qualname__}", algorithm.options.model_dump(mode="json")]


def digest(before: str, data: object) -> str:
    """SHA-256, in hex, of `data`, as JSON, on top of another digest."""
    return hashlib.sha256(f"{before}{json.dumps(data, sort_keys=True, default=str)}".encode()).hexdigest()
