"""Sums over positions, windows of them, and the width."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.equations import settings
from lazyjax.limits.layouts import is_wide, places_of, positions, widths
from lazyjax.limits.moving import along
from lazyjax.limits.reading import Reader
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import Fixed, Leaf, Value, Wide, layout


def reduce_sum(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Sum over positions, or over the width, where a sum is its mean."""
    (value,), gone = given, settings(equation).axes
    if isinstance(value, Fixed):
        shape = tuple(n for i, n in enumerate(value.shape) if i not in gone)
        return layout(value, lambda a: jnp.sum(a, gone), shape)
    if isinstance(value, Leaf):
        return None
    own = [a for i in gone for a in value.axes[i] if a.width is not None]
    if not own:
        return _summed(reader, value, gone, where)
    left = [a for i, axis in enumerate(value.axes) if i not in gone for a in axis]
    if any(a.width is not None for a in left) and len(value.parts) > 1:
        refuse("a sum over some channels of several groups", "", where)
    count = math.prod(a.length for a in own)
    total = sum(n for n, _ in value.parts)
    moments = reader.moments
    shape = tuple(n for i, n in enumerate(value.shape) if i not in gone)
    summed = [p for i in gone for p in places_of(value.axes)[i]]
    full = positions(value.axes)

    def of(side: int) -> jax.Array:
        means = [(n / total, moments.mean(node, side)) for n, node in value.parts]
        found = [weight * m for weight, m in means if m is not None]
        if not found:
            return jnp.zeros((1, *(1,) * len(shape)), moments.dtype)
        mean = sum(found[1:], found[0])
        mean = jnp.broadcast_to(mean, (mean.shape[0], *full))
        mean = jnp.sum(mean, tuple(1 + p for p in summed))
        sizes = []
        for i, axis in enumerate(value.axes):
            if i not in gone:
                if is_wide(axis) and any(a.width is None for a in axis):
                    refuse("a sum over some channels beside positions", "", where)
                sizes.append(1 if is_wide(axis) else value.shape[i])
        return mean.reshape(mean.shape[0], *sizes)

    sides = tuple(map(of, range(len(moments.sizes))))
    zero = all(moments.mean(node, 0) is None for _, node in value.parts)
    reader.contracted |= widths(value.axes)
    return Fixed(sides, shape, count=float(count), zero=zero)


def _summed(reader: Reader, value: Wide, gone: Any, where: str) -> Wide:
    places = places_of(value.axes)
    own = tuple(p for i in gone for p in places[i])
    axes = tuple(a for i, a in enumerate(value.axes) if i not in gone)
    if not own:
        return Wide(value.parts, axes)
    return reader.moved(value, lambda a: jnp.sum(a, own), axes, ("sum", own), selects=False)


def reduce_window(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Sum over windows of positions, an axis after the other."""
    how = settings(equation)
    value: Any = given[0]
    if not isinstance(value, Wide):
        return None
    for axis, size in enumerate(how.window):
        window = (
            size,
            how.strides[axis],
            tuple(how.padding[axis]),
            how.input_steps[axis],
            how.steps[axis],
        )
        if window == (1, 1, (0, 0), 1, 1):
            continue

        def pool(a: jax.Array, place: int, window: Any = window) -> jax.Array:
            def along(its: Any, other: Any) -> Any:
                return [its if i == place else other for i in range(a.ndim)]

            size, stride, padding, input_step, step = window
            return jax.lax.reduce_window(
                a,
                np.zeros((), a.dtype),
                jax.lax.add,
                along(size, 1),
                along(stride, 1),
                along(padding, (0, 0)),
                along(input_step, 1),
                along(step, 1),
            )

        length = equation.outvars[0].aval.shape[axis]
        value = along(reader, value, axis, length, pool, ("pool", window), where, selects=False)
    return value
