"""Operations that lay an array out anew: the same entries, some of them, at other places."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.equations import settings
from lazyjax.limits.layouts import Atom, is_wide, places_of, positions, regroup
from lazyjax.limits.nodes import Node
from lazyjax.limits.reading import Reader
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import Fixed, Leaf, Value, Wide, layout


def laid_out(value: Fixed | Leaf, operation: Any, shape: tuple[int, ...]) -> Fixed | Leaf:
    """Lay out weights, or what is not random, by an operation on arrays."""
    if isinstance(value, Fixed):
        return layout(value, operation, shape)
    with jax.ensure_compile_time_eval():
        entries = np.asarray(operation(jnp.asarray(value.entries)))

    def of(part: Fixed | None) -> Fixed | None:
        return None if part is None else layout(part, operation, shape)

    return replace(value, entries=entries, factor=of(value.factor), values=of(value.values))


def reshape(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Cut and join axes."""
    (value,), shape = given[:1], equation.outvars[0].aval.shape
    if not isinstance(value, Wide):
        return laid_out(value, lambda a: a.reshape(shape), shape)
    axes = regroup(value.axes, shape)
    many = len(value.parts) > 1
    if axes is None or (many and sum(len(a) for a in axes) != sum(len(a) for a in value.axes)):
        refuse("a reshape across positions and channels", "", where)
    return reader.reshaped(value, axes)


def transpose(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Permute axes."""
    order = settings(equation).order
    (value,) = given
    if not isinstance(value, Wide):
        return laid_out(value, lambda a: a.transpose(order), equation.outvars[0].aval.shape)
    places = places_of(value.axes)
    own = [p for i in order for p in places[i]]
    axes = tuple(value.axes[i] for i in order)
    if own == sorted(own):
        return Wide(value.parts, axes)
    return reader.moved(value, lambda a: a.transpose(own), axes, ("transpose", tuple(own)))


def squeeze(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Leave out axes of length 1."""
    (value,), shape = given, equation.outvars[0].aval.shape
    if not isinstance(value, Wide):
        return laid_out(value, lambda a: a.reshape(shape), shape)
    gone = settings(equation).axes
    return Wide(value.parts, tuple(a for i, a in enumerate(value.axes) if i not in gone))


def broadcast(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Lay an array out over new axes."""
    how = settings(equation)
    return _broadcast_to(reader, given[0], tuple(how.shape), tuple(how.axes))


def repeat(reader: Reader, shape: Any, given: list[Value], where: str) -> Value:
    """Broadcast to a shape of the same rank."""
    return _broadcast_to(reader, given[0], shape, tuple(range(len(shape))))


def _broadcast_to(
    reader: Reader, value: Value, shape: tuple[int, ...], mapping: tuple[int, ...]
) -> Value:
    if isinstance(value, Fixed):
        kept = []
        for side in value.sides:
            sizes = [1] * len(shape)
            for axis, to in enumerate(mapping):
                sizes[to] = side.shape[1 + axis]
            kept.append(side.reshape(side.shape[0], *sizes))
        same: dict[int, Any] = {}
        sides = tuple(
            same.setdefault(id(old), new) for old, new in zip(value.sides, kept, strict=True)
        )
        return replace(value, sides=sides, shape=shape)
    if isinstance(value, Leaf):
        return laid_out(value, lambda a: jax.lax.broadcast_in_dim(a, shape, mapping), shape)
    axes = tuple(
        value.axes[mapping.index(i)]
        if i in mapping and value.shape[mapping.index(i)] == n
        else (Atom(n),)
        if n > 1
        else ()
        for i, n in enumerate(shape)
    )
    where_from = [
        len(value.axes[mapping.index(i)]) > 0 and value.shape[mapping.index(i)] == n
        if i in mapping
        else False
        for i, n in enumerate(shape)
    ]
    flags = [
        own for own, axis in zip(where_from, axes, strict=True) for a in axis if a.width is None
    ]
    if all(flags):
        return Wide(value.parts, axes)
    target = positions(axes)
    dims = tuple(i for i, own in enumerate(flags) if own)
    key = ("broadcast", target, dims)
    return reader.moved(value, lambda a: jax.lax.broadcast_in_dim(a, target, dims), axes, key)


def sliced(
    reader: Reader, value: Value, axis: int, start: int, stop: int, stride: int, where: str
) -> Value:
    """Take a part of an array along one axis."""
    length = -(-(stop - start) // stride)
    if (start, stop, stride) == (0, value.shape[axis], 1):
        return value
    shape = (*value.shape[:axis], length, *value.shape[axis + 1 :])
    if not isinstance(value, Wide):
        return laid_out(value, lambda a: jax.lax.slice_in_dim(a, start, stop, stride, axis), shape)
    if is_wide(value.axes[axis]):
        return _some_channels(reader, value, axis, start, stop, stride, where)
    value = reader.merged(value, axis, where)
    place = sum(len(p) for p in places_of(value.axes)[:axis])
    axes = (*value.axes[:axis], (Atom(length),) if length > 1 else (), *value.axes[axis + 1 :])
    target = positions(axes)

    def cut(a: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(a, start, stop, stride, place).reshape(target)

    return reader.moved(value, cut, axes, ("slice", place, start, stop, stride))


def _some_channels(
    reader: Reader, value: Wide, axis: int, start: int, stop: int, stride: int, where: str
) -> Wide:
    if len(value.axes[axis]) != 1 or sum(map(is_wide, value.axes)) != 1:
        refuse("a part of channels that are laid out with others", "", where)
    parts: list[tuple[int, Node]] = []
    at = 0
    for count, node in value.parts:
        low, high = max(start, at) - at, min(stop, at + count) - at
        if stride > 1 and len(value.parts) > 1:
            refuse("every other channel of several groups", "", where)
        if low < high:
            size = -(-(high - low) // stride)
            whole = (low, high, stride) == (0, count, 1)
            part = ("slice", low, high, stride)
            parts.append((size, node if whole else reader.graph.restrict(node, part)))
        at += count
    total = sum(count for count, _ in parts)
    atom = (reader.new_width(total),) if total > 1 else ()
    return Wide(tuple(parts), (*value.axes[:axis], atom, *value.axes[axis + 1 :]))


def static_slice(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Take a part that is known."""
    how, (value,) = settings(equation), given
    strides = how.strides or (1,) * len(how.starts)
    for axis, (start, stop, stride) in enumerate(zip(how.starts, how.stops, strides, strict=True)):
        value = sliced(reader, value, axis, int(start), int(stop), int(stride), where)
    return value


def split(reader: Reader, equation: Any, given: list[Value], where: str) -> list[Value]:
    """Cut into parts along one axis."""
    how, (value,) = settings(equation), given
    ends = np.cumsum(how.sizes)
    return [
        sliced(reader, value, how.axis, int(end - size), int(end), 1, where)
        for end, size in zip(ends, how.sizes, strict=True)
    ]


def dynamic_slice(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Take a part whose start is an argument, which must be known."""
    value, *starts = given
    numbers = [s.number() if isinstance(s, Fixed) else None for s in starts]
    if any(n is None for n in numbers):
        refuse("a slice whose place is not known", "", where)
    for axis, (n, size) in enumerate(zip(numbers, settings(equation).sizes, strict=True)):
        start = int(min(max(n or 0, 0), value.shape[axis] - size))
        value = sliced(reader, value, axis, start, start + size, 1, where)
    return value


def pick(reader: Reader, value: Value, index: int, where: str) -> Value:
    """Give one entry along axis 0."""
    one = sliced(reader, value, 0, index, index + 1, 1, where)
    shape = value.shape[1:]
    if isinstance(one, Wide):
        return Wide(one.parts, one.axes[1:])
    return laid_out(one, lambda a: a.reshape(shape), shape)


def flip(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Reverse axes of positions."""
    flipped, (value,) = settings(equation).axes, given
    if not isinstance(value, Wide):
        return laid_out(value, lambda a: jax.lax.rev(a, flipped), equation.outvars[0].aval.shape)
    for axis in flipped:
        if is_wide(value.axes[axis]):
            refuse("channels in another order", "", where)
        value = reader.merged(value, axis, where)
        for place in places_of(value.axes)[axis]:
            value = reader.moved(
                value, lambda a, p=place: jnp.flip(a, p), value.axes, ("flip", place)
            )
    return value


def along(
    reader: Reader,
    value: Wide,
    axis: int,
    length: int,
    operation: Callable[[jax.Array, int], jax.Array],
    key: Any,
    where: str,
    **options: Any,
) -> Wide:
    """Apply an operation `(array, axis) -> array` along one axis of positions."""
    value = reader.merged(value, axis, where)
    n, before = value.shape[axis], positions(value.axes)
    axes = (*value.axes[:axis], (Atom(length),) if length > 1 else (), *value.axes[axis + 1 :])
    place = sum(len(p) for p in places_of(axes)[:axis])
    full = (*before[:place], n, *before[place + (n > 1) :])  # with that axis, if n is 1 too
    target = positions(axes)

    def apply(a: jax.Array) -> jax.Array:
        return operation(a.reshape(full), place).reshape(target)

    return reader.moved(value, apply, axes, (key, place), **options)


def pad(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Put zeros around and between positions."""
    value: Any = given[0]
    filling = given[1]
    edges = tuple(settings(equation).edges)
    if not isinstance(value, Wide) or not isinstance(filling, Fixed):
        return None
    if filling.number() != 0:
        refuse("a padding that is not 0", "", where)
    for axis, (low, high, inner) in enumerate(edges):
        if not (low or high or inner):
            continue
        n = value.shape[axis]
        edge = (low, high, inner)

        def put(a: jax.Array, place: int, edge: Any = edge) -> jax.Array:
            every = [(0, 0, 0)] * a.ndim
            every[place] = edge
            return jax.lax.pad(a, jnp.zeros((), a.dtype), every)

        length = n + low + high + inner * max(0, n - 1)
        value = along(reader, value, axis, length, put, ("pad", edge), where, fills=True)
    return value
