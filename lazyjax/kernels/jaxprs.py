"""Jaxprs evaluated equation by equation, so that some equations may be done another way."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Literal

INLINE = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
"""Primitives whose jaxpr may be run in their place."""


def inner(equation: Any) -> ClosedJaxpr:
    """Give the jaxpr of an equation that has one."""
    found = equation.params["call_jaxpr" if "call_jaxpr" in equation.params else "jaxpr"]
    return found if isinstance(found, ClosedJaxpr) else ClosedJaxpr(found, ())


def needed(jaxpr: Any) -> list[bool]:
    """Tell which equations the outputs depend on."""
    alive = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    found = [False] * len(jaxpr.eqns)
    for i in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[i]
        if equation.effects or any(v in alive for v in equation.outvars):
            found[i] = True
            alive |= {v for v in equation.invars if not isinstance(v, Literal)}
    return found


def evaluate(jaxpr: Any, equation: Any, read: Callable[[Any], Any]) -> list[Any]:
    """Evaluate one equation as it is."""
    inputs = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
    alone = jaxpr.replace(
        constvars=[],
        invars=inputs,
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    return eval_jaxpr(alone, (), *map(read, inputs))


def rescan(
    equation: Any, inputs: list[Any], body: Callable[[Any, list[Any], Any], Any], more: Any = None
) -> tuple[list[Any], Any]:
    """Run a `scan` equation with another body.

    Parameters
    ----------
    equation : jaxpr equation
    inputs : list
        Values of its operands.
    body : callable
        `(closed jaxpr, values, more) -> outputs, other`.
    more : pytree, optional
        What the scan runs over besides; `body` is given a slice.

    Returns
    -------
    outputs : list
    other : pytree
        What `body` gave besides, stacked.
    """
    settings = equation.params
    constants, carries = settings["num_consts"], settings["num_carry"]
    outside = inputs[:constants]
    start, over = inputs[constants : constants + carries], inputs[constants + carries :]

    def turn(carry: Any, now: Any) -> tuple[Any, Any]:
        over, more = now
        out, other = body(inner(equation), [*outside, *carry, *over], more)
        return out[:carries], (out[carries:], other)

    carry, (out, other) = jax.lax.scan(
        turn,
        start,
        (over, more),
        length=settings["length"],
        reverse=settings["reverse"],
        unroll=settings["unroll"],
    )
    return [*carry, *out], other
