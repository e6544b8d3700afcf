"""The covariances of sources, where randomness enters: entries of weights, tokens, products."""

import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.limits.arrays import Array, add, times
from lazyjax.limits.nodes import (
    Deterministic,
    Entries,
    Node,
    Product,
    Query,
    Source,
    Tokens,
    Window,
    same_entries,
)


def covariance(moments: Any, z: Source, other: Source, q: Query) -> tuple[Array, Array]:
    """Give the covariance of a source, perhaps at other positions, and of its derivatives."""
    match z, other:
        case Product(), _:
            return _product(moments, z, q)
        case Entries(), Entries():
            return _entries(moments, z, other, q)
        case Tokens(), _:
            return _tokens(moments, z, q)
    raise AssertionError(z)


def _entries(moments: Any, z: Entries, other: Entries, q: Query) -> tuple[Array, Array]:
    same: Any = same_entries(z.pattern, other.pattern, q, moments.dtype)
    factor = moments.outer(z.factor.sides[q.left], other.factor.sides[q.right], q)
    same = times(same, factor)
    return (None if z.variance is None else z.variance * same), same


def _tokens(moments: Any, z: Tokens, q: Query) -> tuple[Array, Array]:
    left = moments.spread(z.value.sides[q.left], q, False)
    right = moments.spread(z.value.sides[q.right], q, True)
    same = z.factor**2 * (left == right).astype(moments.dtype)
    return z.variance * same, same


def _product(moments: Any, z: Product, q: Query) -> tuple[Array, Array]:
    square = z.factor**2
    moment = _contracted(moments, z, q, moments.second)
    inner = _contracted(moments, z, q, moments.tangent)
    if moment is None:
        return None, None
    k = z.variance * square * moment
    derivative = square * moment
    return k, derivative if inner is None else derivative + z.variance * square * inner


def _contracted(moments: Any, z: Product, q: Query, ask: Callable[..., Array]) -> Array:
    """Sum over what is contracted: channels, positions and windows."""
    total = None
    for count, h in z.terms:
        if isinstance(h, Deterministic):
            part = _of_inputs(moments, z, h, q) if ask == moments.second else None
        else:
            part = _summed(moments, z, h, q, ask)
        total = add(total, None if part is None else count * part)
    if total is None:
        return None
    first = 1 + q.crossed
    places = len(z.kept)
    for i in z.own if q.every else ():
        n = total.shape[first + i]
        eye = jnp.eye(n, dtype=total.dtype)
        shape = [1] * total.ndim
        shape[first + i] = shape[first + places + i] = n
        total = total * eye.reshape(shape)
    for i, window in enumerate(z.windows):
        axes = (first + i, first + places + i) if q.every else (first + i,)
        total = _window_sum(total, axes, window)
    return total


def _summed(moments: Any, z: Product, h: Node, q: Query, ask: Callable[..., Array]) -> Array:
    every = q.every and bool(z.kept)
    array = ask(h, h, q._replace(every=every))
    if array is None:
        return None
    first = 1 + q.crossed
    array = moments.full(array, h, h, q._replace(every=every))
    letters = iter(string.ascii_letters)
    batch = [next(letters) for _ in range(first)]
    left = [next(letters) for _ in h.shape]
    right = [c if i in z.summed else next(letters) for i, c in enumerate(left)]
    keep_left, keep_right = ([side[i] for i in z.kept] for side in (left, right))
    if every:
        spec = "".join([*batch, *left, *right, "-", *batch, *keep_left, *keep_right])
    else:
        spec = "".join([*batch, *left, "-", *batch, *keep_left])
    return jnp.einsum(spec.replace("-", "->"), array)


def _of_inputs(moments: Any, z: Product, h: Deterministic, q: Query) -> Array:
    """Multiply inputs with inputs."""
    values = [
        jnp.broadcast_to(h.value.sides[side], (h.value.sides[side].shape[0], *h.shape))
        for side in (q.left, q.right)
    ]
    letters = iter(string.ascii_letters)
    ones = next(letters), next(letters)
    batch = ones if q.crossed else (ones[0], ones[0])
    left = [next(letters) for _ in h.shape]
    every = q.every and bool(z.kept)
    shared = [i in z.summed or not every for i in range(len(left))]
    right = [c if same else next(letters) for c, same in zip(left, shared, strict=True)]
    keep_left, keep_right = ([side[i] for i in z.kept] for side in (left, right))
    if not q.crossed and values[0].shape[0] != values[1].shape[0]:
        n = max(len(v) for v in values)
        values = [jnp.broadcast_to(v, (n, *v.shape[1:])) for v in values]
    out = [*(batch if q.crossed else batch[:1]), *keep_left, *(keep_right if every else ())]
    spec = f"{batch[0]}{''.join(left)},{batch[1]}{''.join(right)}->{''.join(out)}"
    return jnp.einsum(spec, *values, precision="highest")


def _window_sum(array: jax.Array, axes: tuple[int, ...], window: Window) -> jax.Array:
    """Sum over the offsets of a window, the same offset along one axis or along two."""
    (low, high), n = window.padding, array.shape[axes[0]]
    length = low + (n - 1) * window.input_step + 1 + high
    places = (length - (window.size - 1) * window.step - 1) // window.stride + 1
    if len(axes) == 1:
        at = np.arange(places)[:, None] * window.stride - low
        offsets = np.arange(n)[None] * window.input_step - at
        inside = (offsets >= 0) & (offsets < window.size * window.step)
        band = jnp.asarray(inside & (offsets % window.step == 0), array.dtype)
        summed = jnp.tensordot(array, band, ((axes[0],), (1,)), precision="highest")
        return jnp.moveaxis(summed, -1, axes[0])
    if low or high or window.input_step > 1:
        edges = [(0, 0, 0)] * array.ndim
        for axis in axes:
            edges[axis] = (low, high, window.input_step - 1)
        array = jax.lax.pad(array, jnp.zeros((), array.dtype), edges)
    total = None
    for i in range(window.size):
        part = array
        for axis in axes:
            start = i * window.step
            stop = start + (places - 1) * window.stride + 1
            part = jax.lax.slice_in_dim(part, start, stop, window.stride, axis)
        total = part if total is None else total + part
    assert total is not None
    return total
