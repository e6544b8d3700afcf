"""The activation patterns of a ReLU network, read from the jaxpr of the model itself."""

from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.equations import Jaxpr, evaluate, inlined, inner_jaxprs
from lazyjax.types import ModelFunction, Params, PyTree


def _makers(jaxpr: Jaxpr) -> dict[Any, JaxprEqn]:
    return {v: equation for equation in jaxpr.eqns for v in equation.outvars}


def _is_square(v: Any, makers: dict[Any, JaxprEqn]) -> bool:
    maker = None if isinstance(v, Literal) else makers.get(v)
    if maker is None:
        return False
    name, operands = maker.primitive.name, maker.invars
    return name in ("square", "integer_pow") or (name == "mul" and operands[0] is operands[1])


def _operand(equation: JaxprEqn, makers: dict[Any, JaxprEqn]) -> Any:
    """Give what a ReLU is taken of, max(a, 0); None where an equation is none.

    A variance is none, the mean of squares less the square of the mean, which layers that normalise
    keep from below 0.
    """
    if equation.primitive.name != "max":
        return None
    a, b = equation.invars
    for operand, other in ((a, b), (b, a)):
        if isinstance(other, Literal) and np.ndim(other.val) == 0 and other.val == 0:
            maker = None if isinstance(operand, Literal) else makers.get(operand)
            if maker is not None and maker.primitive.name == "sub":
                return None if _is_square(maker.invars[1], makers) else operand
            return operand
    return None


def _holds_relu(jaxpr: Jaxpr) -> bool:
    makers = _makers(jaxpr)
    return any(
        _operand(e, makers) is not None or any(map(_holds_relu, inner_jaxprs(e)))
        for e in jaxpr.eqns
    )


class _Unseen(Exception):
    """A ReLU is where it is not looked for: in a loop, a branch or a `custom_vjp`."""


def _run(
    closed: Jaxpr, inputs: list[Any], moving: list[bool], found: list[Any]
) -> tuple[list[Any], list[bool]]:
    """Evaluate a jaxpr; `found` gets what the ReLUs of what moves are taken of."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))
    alive = {v for v, m in zip(jaxpr.invars, moving, strict=True) if m}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    def moves(v: Any) -> bool:
        return not isinstance(v, Literal) and v in alive

    makers = _makers(jaxpr)
    for equation in jaxpr.eqns:
        own, body = list(map(moves, equation.invars)), inlined(equation)
        operand = _operand(equation, makers)
        if operand is not None and moves(operand):
            found.append(read(operand))
        if body is not None:
            out, outputs = _run(body, list(map(read, equation.invars)), own, found)
        elif any(own) and any(map(_holds_relu, inner_jaxprs(equation))):
            raise _Unseen
        else:
            out, outputs = evaluate(jaxpr, equation, read), [any(own)] * len(equation.outvars)
        values |= dict(zip(equation.outvars, out, strict=True))
        alive |= {v for v, m in zip(equation.outvars, outputs, strict=True) if m}
    return list(map(read, jaxpr.outvars)), list(map(moves, jaxpr.outvars))


def relu_inputs(f: ModelFunction, params: Params, x: PyTree) -> Partial | None:
    """Give the function that computes what the ReLUs of a model are taken of.

    Parameters
    ----------
    f : ModelFunction
    params : pytree
    x : array (N, ...) or pytree
        Both for their shapes.

    Returns
    -------
    jax.tree_util.Partial, or None
        `g(params, x)` -> a tuple of arrays, one for each max(a, 0) of an `a` that depends on the
        parameters, in the order in which they are computed: what `lazyjax.metrics.pattern_change`
        takes. None where the model has none, or has them in loops, branches or a `custom_vjp`,
        which are not looked into.

    Raises
    ------
    TypeError, ValueError
        If `f` is no function, or `params` and `x` do not fit it.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f = lambda w, x: jnp.sum(jax.nn.relu(x @ w), axis=1)
    >>> w, x = jnp.array([[1.0, -1.0]]), jnp.ones((1, 1))
    >>> relu_inputs(f, w, x)(w, x)[0].tolist()
    [[1.0, -1.0]]
    >>> relu_inputs(lambda w, x: jnp.tanh(x @ w), w, x)
    """
    f = checks.model_function(f)
    checks.outputs(f, params, x)
    inputs = Partial(_inputs, f)
    try:
        return inputs if jax.eval_shape(inputs, params, x) else None
    except _Unseen:
        return None


def _inputs(f: Partial, params: Params, x: PyTree) -> tuple[jax.Array, ...]:
    found: list[jax.Array] = []
    leaves, others = jax.tree.leaves(params), jax.tree.leaves(x)
    moving = [True] * len(leaves) + [False] * len(others)
    _run(jax.make_jaxpr(f)(params, x), leaves + others, moving, found)
    return tuple(found)
