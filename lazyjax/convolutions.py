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
from jax.extend.core import JaxprEqn, Literal

from lazyjax.equations import INLINE, Jaxpr, evaluate, inner_jaxprs, known, rescan, settings
from lazyjax.meshes import may_be_shared_out
from lazyjax.types import PyTree


def patches(x: jax.Array, *, convolution: Any, window: tuple[int, ...]) -> jax.Array:
    """Give the patches of a convolution's input, (batch, *places, prod(window), features)."""
    layout = convolution.numbers.lhs_spec
    x = x.transpose(layout[0], *layout[2:], layout[1])
    padding = zip(convolution.padding, convolution.input_steps, strict=True)
    edges = [(0, 0, 0), *((low, high, step - 1) for (low, high), step in padding), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    strides, steps = convolution.strides, convolution.filter_steps
    places = [
        (n - (w - 1) * step - 1) // stride + 1
        for n, w, step, stride in zip(x.shape[1:-1], window, steps, strides, strict=True)
    ]

    def shifted(offset: tuple[int, ...]) -> jax.Array:
        starts = [i * step for i, step in zip(offset, steps, strict=True)]
        stops = [
            start + (n - 1) * stride + 1
            for start, n, stride in zip(starts, places, strides, strict=True)
        ]
        return lax.slice(x, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *strides, 1))

    offsets = [()]
    for w in window:
        offsets = [(*offset, i) for offset in offsets for i in range(w)]
    return jnp.stack([shifted(offset) for offset in offsets], axis=-2)


Convolve = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""`(settings of the equation, input, filters) -> output`."""


def _features_last(convolution: Any, x: jax.Array, filters: jax.Array) -> jax.Array:
    """Convolve with the batch first and the features last."""
    numbers = convolution.numbers
    x_axes = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    filter_axes = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    out_axes = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    n = x.ndim
    places = tuple(range(1, n - 1))
    windows = lax.conv_general_dilated(
        x.transpose(x_axes),
        filters.transpose(filter_axes),
        convolution.strides,
        convolution.padding,
        convolution.input_steps,
        convolution.filter_steps,
        lax.ConvDimensionNumbers(
            (0, n - 1, *places), (n - 1, n - 2, *range(n - 2)), (0, n - 1, *places)
        ),
        convolution.groups,
        convolution.batch_groups,
        convolution.precision,
        convolution.dtype,
    )
    return windows.transpose([out_axes.index(i) for i in range(n)])


def _by_patches(convolution: Any, x: jax.Array, filters: jax.Array) -> jax.Array:
    """Convolve by one product of matrices with the patches of the input."""
    numbers = convolution.numbers
    batches, groups = convolution.batch_groups, convolution.groups
    filters = filters.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    window, (into, out) = filters.shape[:-2], filters.shape[-2:]
    # (batch, *places, window, features)
    windows = patches(x, convolution=convolution, window=window)
    if batches > 1:  # groups of the batch are groups of features of a smaller batch
        windows = windows.reshape(batches, -1, *windows.shape[1:])
        windows = jnp.moveaxis(windows, 0, -2)
        groups = batches
    windows = windows.reshape(*windows.shape[: 2 + len(window)], groups, into)
    y = jnp.einsum(
        "n...wgc,wcgk->n...gk",
        windows,
        filters.reshape(-1, into, groups, out // groups),
        precision=convolution.precision,
        preferred_element_type=convolution.dtype,
    )
    y = y.reshape(*y.shape[:-2], out)
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return y.transpose([order.index(i) for i in range(y.ndim)])


def _is_convolution(equation: JaxprEqn) -> bool:
    return equation.primitive.name == "conv_general_dilated"


def _opens(equation: JaxprEqn) -> bool:
    """Tell whether `_run` goes into an equation."""
    name = equation.primitive.name
    return (name in INLINE or name == "scan") and known(equation)


def _holds_convolution(jaxpr: Jaxpr) -> bool:
    return any(
        _is_convolution(e) or any(map(_holds_convolution, inner_jaxprs(e))) for e in jaxpr.eqns
    )


def _hides_convolution(jaxpr: Jaxpr) -> bool:
    """Tell whether a convolution stands where `_run` does not get: a custom rule, a branch."""

    def hides(equation: JaxprEqn) -> bool:
        if _is_convolution(equation):
            return not known(equation)
        inside = _hides_convolution if _opens(equation) else _holds_convolution
        return any(map(inside, inner_jaxprs(equation)))

    return any(map(hides, jaxpr.eqns))


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
        inputs = [read(v) for v in equation.invars]
        if _is_convolution(equation) and known(equation):
            out = [convolve(settings(equation), *inputs)]
        elif not (_opens(equation) and any(map(_holds_convolution, inner_jaxprs(equation)))):
            out = evaluate(jaxpr, equation, read)
        elif equation.primitive.name == "scan":
            out, _ = rescan(equation, inputs, partial(_run, convolve=convolve))
        else:
            out, _ = _run(settings(equation).body, inputs, convolve=convolve)
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


def one_by_one(jaxpr: Jaxpr) -> Examples:
    """Give the way to differentiate a model on each example that is right on several devices.

    Parameters
    ----------
    jaxpr : Jaxpr
        Of the model.

    Returns
    -------
    `Examples`
    """

    def at_once(function: Callable[[Any], Any], x: PyTree) -> Any:
        return jax.vmap(function)(x)

    if not may_be_shared_out():  # convolutions are faster
        return Examples(lambda model: model, at_once)
    if _hides_convolution(jaxpr):
        return Examples(lambda model: model, jax.lax.map)
    return Examples(partial(_with, _by_patches), at_once)
