"""Convolutions written in another way, where XLA is slow with them or wrong.

In the body of a loop XLA's CPU backend is fast in one layout only: it brings convolutions to it in
the outermost computation, and one in another layout, as every cotangent of a convolution is, falls
back to code ten times slower there. And over examples that are shared out to several devices it
computes wrong filter gradients of single examples (`tests/test_sharded.py` shows it).
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from lazyjax.derivatives import inner_jaxprs
from lazyjax.kernels.jaxprs import INLINE, evaluate, inner, rescan
from lazyjax.kernels.rules import patches

Convolve = Callable[[dict[str, Any], jax.Array, jax.Array], jax.Array]
"""`(settings of the equation, input, filters) -> output`."""


def _features_last(settings: dict[str, Any], x: jax.Array, filters: jax.Array) -> jax.Array:
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


def _by_patches(settings: dict[str, Any], x: jax.Array, filters: jax.Array) -> jax.Array:
    """Convolve by one product of matrices with the patches of the input."""
    numbers = settings["dimension_numbers"]
    batches, groups = settings["batch_group_count"], settings["feature_group_count"]
    filters = filters.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    window, (into, out) = filters.shape[:-2], filters.shape[-2:]
    found = patches(x, settings=settings, window=window)  # (batch, *places, window, features)
    if batches > 1:  # groups of the batch are groups of features of a smaller batch
        found = found.reshape(batches, -1, *found.shape[1:])
        found = jnp.moveaxis(found, 0, -2)
        groups = batches
    found = found.reshape(*found.shape[: 2 + len(window)], groups, into)
    y = jnp.einsum(
        "n...wgc,wcgk->n...gk",
        found,
        filters.reshape(-1, into, groups, out // groups),
        precision=settings["precision"],
        preferred_element_type=settings["preferred_element_type"],
    )
    y = y.reshape(*y.shape[:-2], out)
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return y.transpose([order.index(i) for i in range(y.ndim)])


def _holds_convolution(jaxpr: Any) -> bool:
    return any(
        e.primitive.name == "conv_general_dilated"
        or (
            (e.primitive.name in INLINE or e.primitive.name == "scan")
            and _holds_convolution(inner(e).jaxpr)
        )
        for e in jaxpr.eqns
    )


def _hides_convolution(jaxpr: Any) -> bool:
    """Tell whether a convolution stands where `_run` does not get: a custom rule, a branch."""
    for e in jaxpr.eqns:
        inside = list(inner_jaxprs(list(e.params.values())))
        if e.primitive.name in INLINE or e.primitive.name == "scan":
            found = any(map(_hides_convolution, inside))
        else:
            found = any(_holds_convolution(j) or _hides_convolution(j) for j in inside)
        if found:
            return True
    return False


def _run(
    closed: Any, arguments: Any, _: Any = None, *, convolve: Convolve
) -> tuple[list[Any], None]:
    """Evaluate a jaxpr with its convolutions done in another way."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inputs = [read(v) for v in equation.invars]
        if name == "conv_general_dilated":
            out = [convolve(equation.params, *inputs)]
        elif name in INLINE and _holds_convolution(inner(equation).jaxpr):
            out, _ = _run(inner(equation), inputs, convolve=convolve)
        elif name == "scan" and _holds_convolution(inner(equation).jaxpr):
            out, _ = rescan(equation, inputs, partial(_run, convolve=convolve))
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
    return function if jax.default_backend() != "cpu" else _with(_features_last, function)


def _with(convolve: Convolve, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def same(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if not _holds_convolution(closed.jaxpr):
            return function(*arguments)
        out, _ = _run(closed, jax.tree.leaves(arguments), convolve=convolve)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return same


class Examples(NamedTuple):
    """How a model is differentiated by its filters, one example at a time."""

    model: Callable[[Callable[..., Any]], Callable[..., Any]]  # the model, to be differentiated
    each: Callable[[Callable[[Any], Any], Any], Any]  # (function of an example, x) -> results


def one_by_one(jaxpr: Any) -> Examples:
    """Give the way to differentiate a model on each example that is right on several devices.

    Parameters
    ----------
    jaxpr : Jaxpr
        Of the model.

    Returns
    -------
    Examples
    """

    def at_once(function: Callable[[Any], Any], x: Any) -> Any:
        return jax.vmap(function)(x)

    if jax.device_count() == 1:  # examples cannot be shared out, and convolutions are faster
        return Examples(lambda model: model, at_once)
    if _hides_convolution(jaxpr):
        return Examples(lambda model: model, jax.lax.map)
    return Examples(partial(_with, _by_patches), at_once)
