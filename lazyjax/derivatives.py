"""Directional derivatives that are right for every differentiable function, `custom_vjp` included.

A function with a `custom_vjp` has no forward mode: `jax.jvp` raises, and the linear function of
`jax.linearize` raises only when it is applied. Its own rule gives the vjp, which is linear in the
cotangent, so the vjp of the vjp is the jvp. Such functions are found in the jaxpr; all others keep
`jax.jvp`, at half the cost.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lazyjax.equations import Jaxpr, inner_jaxprs, is_custom_jvp, is_custom_vjp


def _calls_custom_vjp(jaxpr: Jaxpr) -> bool:
    for equation in jaxpr.eqns:
        if is_custom_vjp(equation):
            return True
        if is_custom_jvp(equation):
            continue  # its own rule is used, its body is never differentiated
        if any(map(_calls_custom_vjp, inner_jaxprs(equation))):
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
