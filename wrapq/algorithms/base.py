"""What an algorithm declares, so that the plan can order and check a stack without knowing any algorithm by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from wrapq.errors import WrapqError
from wrapq.observers.base import Observer
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.registry import Configurable, Registry
from wrapq.statistics.input import InputStatistics

Phase = Literal["transform", "range", "round", "correct"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Kind = Literal["transform", "range setter", "rounder", "block rounder", "corrector"]
"""What an algorithm may be: `wrapq.algorithms.transform.Transform`, or one of the classes below."""
BLOCK = "block"
"""What a block rounder needs."""


class Algorithm(Configurable, ABC):
    """One stage of the stack. It never runs the model: it is given tensors and gives tensors back.

    A new one is a subclass of one of the kinds, in a file of its own; their docstrings show a whole one each. A recipe
    names it as `+algorithm@stack.NAME={algorithm: nearest}`, or by the file `conf/algorithm/nearest.yaml` of a package
    of presets; from Python it is `wrapq.calibrate(model, batches, {"round": "nearest"})`.

    Attributes:
        kind: what it is; set by the classes below and by `Transform`.
        phase: where in the stack it belongs; transforms come before ranges, ranges before rounding, corrections last.
        handles: the role of the points it finalizes; `model` for a transform, which finalizes none.
        combines: how what it reports of parts of a weight (`wrapq.calibration.grouped_conv`) becomes one figure, by
            name; the sum of them where it is not in here.
    """

    kind: ClassVar[Kind]
    phase: ClassVar[Phase]
    handles: ClassVar[Literal["weight", "activation", "model"]]
    combines: ClassVar[Mapping[str, Callable[[Sequence[float]], float]]] = MappingProxyType({})

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics of a weight's input that it must be given, by the names of
        `wrapq.statistics.input.InputStatistics`. What ranges of activations need, the observers of the specs say."""
        return ()


class Rounded(NamedTuple):
    """A weight's codes [N, K] in the grid of `qparams`, and figures worth keeping, such as the damping it took."""

    integers: Tensor
    qparams: QParams
    report: Mapping[str, float] = MappingProxyType({})


class Rounding(Algorithm):
    """Chooses the codes of weights, which are the integers themselves on an integer grid; each weight has exactly one.
    Its kinds are `Rounder` and `BlockRounder`."""

    phase = "round"
    handles = "weight"

    def unsupported(self, spec: QuantSpec) -> str | None:
        """Why weights of `spec` cannot be rounded with these options, or None when they can; asked by the plan."""
        return None


class Rounder(Rounding):
    """Chooses the codes of one weight at a time.

        @ALGORITHMS.register("nearest")
        class Nearest(Rounder):
            '''Rounds to nearest, and reports the power of what the weight multiplies.'''

            needs = ("hessian",)  # statistics of the weight's input; left out where none are needed

            def round(self, weight, spec, where, statistics=None):
                qparams = observe_tensor(weight, spec, where)
                power = statistics.get("hessian", where).diagonal().mean() / statistics.rows
                return Rounded(qparams.quantize(weight), qparams, {"input_power": float(power)})

    Attributes:
        groups_at_once: where groups of rows have inputs of their own, it is given the weight as a whole and statistics
            with all groups in front, [G, ...]; else each group by itself (`wrapq.calibration.grouped_conv`).
    """

    kind = "rounder"
    groups_at_once: ClassVar[bool] = False

    @abstractmethod
    def round(self, weight: Tensor, spec: QuantSpec, where: str, statistics: InputStatistics | None = None) -> Rounded:
        """The codes for `weight` [N, K], float; `where` names the point in errors. `statistics`, of what the weight is
        multiplied with, are there when `needs` names any."""


class BlockWeight(NamedTuple):
    """A weight that is to be rounded: float [N, K], and the spec of its grid."""

    matrix: Tensor
    spec: QuantSpec


class BlockProblem(Protocol):
    """A block whose weights are to be rounded together: its inputs and the outputs of the float model are in it.

    Attributes:
        batches: how many batches there are.
        seed: of any random choice, so that the same recipe makes the same ones.
    """

    @property
    def weights(self) -> Mapping[str, BlockWeight]:
        """The weights to round, by the point's full name."""

    batches: int
    seed: int

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The mean squared error of the block's output, over real tokens, for the batch of a number, from 0, when for
        each of `self.weights` it computes with a matrix [N, K] of `weights`; differentiable."""


class BlockRounder(Rounding):
    """Chooses the codes of all weights of a block that are its to round.

        @ALGORITHMS.register("best_observer")
        class BestObserver(BlockRounder):
            '''Rounds all weights to nearest, with the ranges of whichever observer serves the block's output best.'''

            def round_block(self, problem):
                tries = [self.nearest(problem, observer) for observer in ("minmax", "mse")]
                return min(tries, key=lambda rounded: self.error(problem, rounded))

            def nearest(self, problem, observer):
                rounded = {}
                for where, (matrix, spec) in problem.weights.items():
                    qparams = observe_tensor(matrix, replace(spec, observer=observer), where)
                    rounded[where] = Rounded(qparams.quantize(matrix), qparams)
                return rounded

            def error(self, problem, rounded):
                weights = {where: r.qparams.dequantize(r.integers, torch.float32) for where, r in rounded.items()}
                return sum(float(problem.loss(batch, weights)) for batch in range(problem.batches))

    It gets no statistics: the block with its inputs, and what the float model makes of them, are in `problem`.
    """

    kind = "block rounder"
    needs = (BLOCK,)

    @abstractmethod
    def round_block(self, problem: BlockProblem) -> dict[str, Rounded]:
        """The codes for each weight of `problem`, by the point's full name."""


class Correction(NamedTuple):
    """What is added to the output of a module with a rounded weight: `bias` [N], and `x A^T B^T` for `a` [r, K] and
    `b` [N, r]; either may be absent."""

    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    report: Mapping[str, float] = MappingProxyType({})


class Corrector(Algorithm):
    """Makes good, beside a weight that is rounded already, some of what its rounding lost.

        @ALGORITHMS.register("mean_output")
        class MeanOutput(Corrector):
            '''Adds to the bias what the rounding error takes from the mean of the output.'''

            adds = "bias"
            needs = ("mean",)

            def correct(self, weight, error, where, statistics):
                return Correction(bias=error @ statistics.get("mean", where).float())

    Attributes:
        adds: what it gives; a weight gets each from one stage at most.
    """

    kind = "corrector"
    phase = "correct"
    handles = "weight"
    adds: ClassVar[Literal["bias", "low_rank"]]

    def takes(self, wrapper: str) -> bool:
        """Whether it corrects the weights of modules under the wrapper called so."""
        return True

    @abstractmethod
    def correct(self, weight: Tensor, error: Tensor, where: str, statistics: InputStatistics) -> Correction:
        """What to add for `weight` [N, K], float, of which what is computed with lacks `error` [N, K]; `statistics` are
        those that `needs` names. Raises `UnusableStatisticsError` where no data reached the weight."""

    def added_elements(self, shape: tuple[int, int]) -> int:
        """How many numbers, in the model's dtype, it adds to a weight [N, K]."""
        return 0


class RangeSetter(Algorithm):
    """Chooses the parameters of a static activation point from what its observer saw.

        class WiderOptions(Options):
            '''Options of wider ranges.'''

            factor: float = Field(1.1, gt=0, description="What the range of the observer is multiplied by.")

        @ALGORITHMS.register("wider")
        class Wider(RangeSetter):
            '''Widens the range that the spec's observer found.'''

            Options = WiderOptions
            options: WiderOptions

            def choose(self, observer, where):
                qparams = observer.qparams(where)
                return replace(qparams, scale=qparams.scale * self.options.factor)

    The observer is the one that the point's spec names, and has seen all calibration data.
    """

    kind = "range setter"
    phase = "range"
    handles = "activation"

    @abstractmethod
    def choose(self, observer: Observer, where: str) -> QParams:
        """The parameters for the point `where`; raises `CalibrationError` when the data cannot be used."""


class _Algorithms(Registry[type[Algorithm]]):
    """Refuses what is none of the kinds, which nothing would run."""

    def register(self, *names: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
        add = super().register(*names)

        def checked(entry: type[Algorithm]) -> type[Algorithm]:
            if getattr(entry, "kind", None) not in get_args(Kind):
                kinds = ", ".join(get_args(Kind))
                what = f"algorithm {names[0]!r}: {entry.__name__} is no kind of algorithm that a stack can run"
                raise WrapqError(f"{what}: derive it from the class of one of these: {kinds}")
            return add(entry)

        return checked


ALGORITHMS: Registry[type[Algorithm]] = _Algorithms("algorithm", "wrapq.algorithms")
