"""What both doors from Flax share: a module as a function, and what it may be called with."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import errors

from lazyjax.types import Params, PyTree


class Applied:
    """A module as a function; equal for equal modules, so that jit compiles once.

    `apply(*static, constants, params, x)`, and what is static decides equality.
    """

    def __init__(self, apply: Callable[..., Any], *static: Any):
        self.apply, self.static = apply, static

    def __call__(self, constants: Any, params: Params, x: PyTree) -> Any:
        """Apply the module, and say in words of models what Flax refuses."""
        try:
            return self.apply(*self.static, constants, params, x)
        except errors.ModifyScopeVariableError as error:
            raise ValueError(
                "`f` must be in evaluation mode, but its module updates variables that are "
                "constants here, as batch normalisation does in training. Pass train=False or "
                f"use_running_average=True. It said: {error}"
            ) from error
        except errors.InvalidRngError as error:
            raise ValueError(
                "`f` must be deterministic, but its module asks for random numbers, as dropout "
                f"does that is on. Pass train=False or deterministic=True. It said: {error}"
            ) from error

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        try:
            return isinstance(other, Applied) and bool(
                self.apply == other.apply and self.static == other.static
            )
        except (TypeError, ValueError):  # fields that do not compare, arrays among them
            return False

    def __hash__(self) -> int:
        try:
            return hash((self.apply, self.static))
        except TypeError:
            return hash((self.apply, type(self.static[0])))


def check_one_input(module: Any, method: Any, call: Mapping[str, Any]) -> None:
    """Require a method that takes x, and beside it the keywords of the call."""
    function = method if callable(method) else getattr(module, method or "__call__", None)
    kind = type(module).__name__
    if function is None:
        raise ValueError(
            f"`method` must name a method of {kind}, got {method or '__call__'!r}. Name one, or "
            "pass method=lambda module, x: ..."
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # what is written in C tells nothing
        return
    takes_module = callable(method) and not inspect.ismethod(method)
    others = parameters[2:] if takes_module else parameters[1:]
    missing = [
        p.name
        for p in others
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in call
    ]
    if missing:
        raise ValueError(
            f"`module` must be called with one input, and {kind} requires {missing} too. Give a "
            f"setting as a keyword, {missing[0]}=..., or put several inputs into one: "
            'method=lambda module, x: module(x["a"], x["b"]).'
        )
