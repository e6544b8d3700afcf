"""Directional derivatives that are right for every differentiable function, `custom_vjp` included.

A function with a `custom_vjp` has no forward mode: `jax.jvp` raises, and the linear function of
`jax.linearize` raises only when it is applied. Its own rule gives the vjp, which is linear in the
cotangent, so the vjp of the vjp is the jvp. Such functions are found in the jaxpr; all others keep
`jax.jvp`, at half the cost.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def inner_jaxprs(value: Any) -> Iterator[Any]:
    """Jaxprs among the parameters of an equation, open or closed, alone or in a tuple."""
    if isinstance(value, tuple | list):
        for entry in value:
            yield from inner_jaxprs(entry)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from inner_jaxprs(value.jaxpr)


def constants(value: Any) -> list[Any]:
    """Give the constants of a jaxpr and of those inside it: what a `jit` in a function holds."""
    if isinstance(value, tuple | list):
        return [constant for entry in value for constant in constants(entry)]
    if not hasattr(value, "eqns") and not hasattr(value, "jaxpr"):
        return []
    inner = [constants(list(e.params.values())) for e in getattr(value, "jaxpr", value).eqns]
    return [*getattr(value, "consts", ()), *(constant for one in inner for constant in one)]


def _calls_custom_vjp(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("custom_vjp_call"):
            return True
        if equation.primitive.name.startswith("custom_jvp_call"):
            continue  # its own rule is used, its body is never differentiated
        inner = (j for value in equation.params.values() for j in inner_jaxprs(value))
        if any(_calls_custom_vjp(j) for j in inner):
            return True
    return False


def has_custom_vjp(function: Callable[..., Any], *arguments: Any) -> bool:
    """Tell whether differentiating `function` meets a `custom_vjp`.

    Parameters
    ----------
    function : callable
        Any traceable function.
    *arguments : pytrees
        Where to trace it; only shapes and dtypes matter.

    Returns
    -------
    bool
        True if a `custom_vjp` stands in its jaxpr outside of a `custom_jvp`.
    """
    return _calls_custom_vjp(jax.make_jaxpr(function)(*arguments).jaxpr)


def _product_by_transposing(
    function: Callable[[Any], Any], primal: Any
) -> tuple[Any, Callable[[Any], Any]]:
    """Return the value and v -> J v, the vjp of the (linear) vjp."""
    value, pullback = jax.vjp(function, primal)
    zero = jax.tree.map(jnp.zeros_like, value)
    _, transposed = jax.vjp(lambda u: pullback(u)[0], zero)
    return value, lambda tangent: transposed(tangent)[0]


def jvp(function: Callable[[Any], Any], primal: Any, tangent: Any) -> tuple[Any, Any]:
    """Compute `function(primal)` and the directional derivative J tangent.

    Parameters
    ----------
    function : callable
        A function of one pytree; may contain `custom_vjp` functions.
    primal, tangent : pytrees
        The point and the direction, of one structure.

    Returns
    -------
    value, derivative
        Pytrees of the shape of the output.
    """
    if has_custom_vjp(function, primal):
        value, product = _product_by_transposing(function, primal)
        return value, product(tangent)
    return jax.jvp(function, (primal,), (tangent,))


def linearization(function: Callable[[Any], Any], primal: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Compute `function(primal)` and the linear map v -> J v, its residuals stored once.

    Parameters
    ----------
    function : callable
        A function of one pytree; may contain `custom_vjp` functions.
    primal : pytree
        The point.

    Returns
    -------
    value : pytree
    product : callable
        v -> J v. A pytree whose leaves are the residuals.
    """
    if not has_custom_vjp(function, primal):
        return jax.linearize(function, primal)
    value, product = _product_by_transposing(function, primal)
    # product is linear and made of ordinary operations: linearizing it stores its residuals.
    return value, jax.linearize(product, jax.tree.map(jnp.zeros_like, primal))[1]
