"""Making a sampler or a launcher from its name and the options beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from wrapq.errors import Problem, UnknownNameError, WrapqError
from wrapq.recipe.suggest import unknown
from wrapq.registry import Registry
from wrapq.sweep.planner import SweepError


class SweepOptions(BaseModel):
    """Base of the options of samplers and launchers: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HasOptions(Protocol):
    """A class with options."""

    Options: type[SweepOptions]


K = TypeVar("K", bound=HasOptions)


def check_options(registry: Registry[Any], key: str, name: str, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class called `name` and its options; raises `SweepError` with all that is wrong with them."""
    try:
        kind = registry.get(name)
    except UnknownNameError as error:
        raise SweepError([unknown(f"{key}={name}", registry.kind, name, error.names)]) from None
    try:
        return kind, kind.Options.model_validate(dict(given))
    except ValidationError as error:
        fields = kind.Options.model_fields
        group = key.split(".")[0]
        raise SweepError([_problem(f"{registry.kind} {name}: {group}", e, fields) for e in error.errors()]) from None


def require(package: str, extra: str) -> None:
    """Refuse what needs an optional package that is not installed; imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise WrapqError(f"this needs the package {package!r}, which is not installed: pip install 'wrapq[{extra}]'")


def _problem(where: str, error: Any, fields: Mapping[str, Any]) -> Problem:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return unknown(f"{where}.{name}", "option", name, fields)
    return Problem(f"{where}.{name}={error['input']!r}", str(error["msg"]))
