"""Convolutions in the one layout that XLA's CPU backend runs fast inside a loop.

XLA brings convolutions to that layout in the outermost computation only. In the body of a loop one
in another layout, as every cotangent of a convolution is, falls back to code ten times slower.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal

from lazyjax.kernels.jaxprs import INLINE, evaluate, inner, rescan


def _convolution(settings: dict[str, Any], x: jax.Array, filters: jax.Array) -> jax.Array:
    """Convolve with the batch first and the features last."""
    numbers = settings["dimension_numbers"]
    x_axes = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    filter_axes = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    out_axes = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    n = x.ndim
    places = tuple(range(1, n - 1))
    found = lax.conv_general_dilated(
        x.transpose(x_axes),
        filters.transpose(filter_axes),
        settings["window_strides"],
        settings["padding"],
        settings["lhs_dilation"],
        settings["rhs_dilation"],
        lax.ConvDimensionNumbers(
            (0, n - 1, *places), (n - 1, n - 2, *range(n - 2)), (0, n - 1, *places)
        ),
        settings["feature_group_count"],
        settings["batch_group_count"],
        settings["precision"],
        settings["preferred_element_type"],
    )
    return found.transpose([out_axes.index(i) for i in range(n)])


def _holds_convolution(jaxpr: Any) -> bool:
    return any(
        e.primitive.name == "conv_general_dilated"
        or (
            (e.primitive.name in INLINE or e.primitive.name == "scan")
            and _holds_convolution(inner(e).jaxpr)
        )
        for e in jaxpr.eqns
    )


def _run(closed: Any, arguments: Any, _: Any = None) -> tuple[list[Any], None]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inputs = [read(v) for v in equation.invars]
        if name == "conv_general_dilated":
            out = [_convolution(equation.params, *inputs)]
        elif name in INLINE and _holds_convolution(inner(equation).jaxpr):
            out, _ = _run(inner(equation), inputs)
        elif name == "scan" and _holds_convolution(inner(equation).jaxpr):
            out, _ = rescan(equation, inputs, _run)
        else:
            out = evaluate(jaxpr, equation, read)
        values |= dict(zip(equation.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars], None


def plain_convolutions(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Bring every convolution of a function to that layout, on the CPU.

    Parameters
    ----------
    function : callable
        Of one pytree of arrays.

    Returns
    -------
    callable
        The same function.
    """
    if jax.default_backend() != "cpu":
        return function

    @wraps(function)
    def same(x: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(x)
        if not _holds_convolution(closed.jaxpr):
            return function(x)
        out, _ = _run(closed, jax.tree.leaves(x))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return same
