"""Values chosen by Optuna from the outcomes so far."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from wrapq.errors import Problem, WrapqError
from wrapq.recipe.axes import Axis, Interval
from wrapq.redact import redact
from wrapq.registry import Options, require
from wrapq.sweep.job import DONE, Outcome, SweepError
from wrapq.sweep.samplers.base import SAMPLERS, Sampler, Suggestion

_OUTCOME, _EXCESS, _SWEEP = "outcome", "excess", "sweep"


class OptunaOptions(Options):
    """`trials`: jobs in all; `seed`; `storage`: a file or the address of a database, else a file of the sweep."""

    trials: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    storage: str | None = None


@SAMPLERS.register("optuna")
class Optuna(Sampler):
    """A tree-structured Parzen estimator over the axes, with the goals as constraints.

    Each batch is drawn by a sampler seeded with `seed` and the number of trials so far: a sweep that was interrupted
    goes on as it would have gone on. Several machines share one study when `storage` names a database
    (`postgresql://...`) or a file that all of them see; together they run `trials` jobs.
    """

    Options = OptunaOptions
    options: OptunaOptions
    _study: Any = None
    _asked: dict[int, Any]
    _folder = ""

    def preview(self) -> Iterable[Mapping[str, str]]:
        require("optuna", "optuna")
        if not self.axes.axes:
            remedy = "give several values or an interval: stack.round.damp=interval(0.001,0.1)"
            raise SweepError([Problem("", "sweep.sampler=optuna", "nothing varies", (), remedy)])
        return self.axes.cover()

    @property
    def total(self) -> int:
        return self.options.trials

    def open(self, folder: Path) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        question = repr((self.axes, self.minimize))
        storage: Any = self.options.storage or str(folder / "study.log")
        try:
            if "://" not in storage:
                storage = JournalStorage(JournalFileBackend(storage))
            self._study = optuna.create_study(
                storage=storage,
                study_name=f"{self.name}-{hashlib.sha256(question.encode()).hexdigest()[:8]}",
                directions=["minimize"] * len(self.minimize),
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's, a driver's, the file system's
            reason = redact(str(error).splitlines()[0])
            raise WrapqError(f"sweep.storage: the study cannot be opened: {reason}") from error
        self._asked, self._folder = {}, str(folder)
        for trial in self._study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            if trial.user_attrs.get(_SWEEP) == self._folder:  # its process died; it is the next to be tried
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                self._study.enqueue_trial(trial.params)

    def ask(self, count: int) -> list[Suggestion]:
        from optuna.samplers import TPESampler

        suggestions: list[Suggestion] = []
        while len(suggestions) < count and (tried := len(self._tried())) < self.total:
            with warnings.catch_warnings(action="ignore"):  # constraints are still called experimental
                excess = lambda trial: [trial.user_attrs.get(_EXCESS, 0.0)]  # noqa: E731
                self._study.sampler = TPESampler(seed=self.options.seed + tried, constraints_func=excess)
            trial = self._study.ask({axis.key: _distribution(axis) for axis in self.axes.axes})
            trial.set_user_attr(_SWEEP, self._folder)
            if sum(other < trial.number for other in self._tried()) >= self.total:  # another machine was faster
                self._fail(trial)
                break
            self._asked[trial.number] = trial
            suggestions.append(Suggestion(trial.number + 1, _values(trial)))
        return suggestions

    def tell(self, suggestion: Suggestion, outcome: Outcome) -> None:
        trial = self._asked[suggestion.number - 1]
        trial.set_user_attr(_OUTCOME, outcome.to_json())
        if outcome.status not in DONE or any(name not in outcome.figures for name in self.minimize):
            self._fail(trial)
            return
        trial.set_user_attr(_EXCESS, max((v.excess() for v in outcome.goals.values()), default=0.0))
        self._study.tell(trial, [outcome.figures[name] for name in self.minimize])

    def elsewhere(self) -> list[tuple[int, Mapping[str, str], Outcome]]:
        return [
            (trial.number + 1, _values(trial), Outcome.from_json(trial.user_attrs[_OUTCOME]))
            for trial in self._study.get_trials(deepcopy=False)
            if trial.number not in self._asked and _OUTCOME in trial.user_attrs
        ]

    def _fail(self, trial: Any) -> None:
        from optuna.trial import TrialState

        self._study.tell(trial, state=TrialState.FAIL)

    def _tried(self) -> list[int]:
        """The numbers of the trials that count: all but those to come and those whose process died."""
        from optuna.trial import TrialState

        counts = (TrialState.COMPLETE, TrialState.RUNNING)
        trials = self._study.get_trials(deepcopy=False)
        return [t.number for t in trials if t.state in counts or _OUTCOME in t.user_attrs]


def _values(trial: Any) -> dict[str, str]:
    return {key: str(value) for key, value in trial.params.items()}


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = axis.values
    if not isinstance(values, Interval):
        return CategoricalDistribution(values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
