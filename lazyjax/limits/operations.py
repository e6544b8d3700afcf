"""The operations of which the limit is known, and what each does to fields and weights."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.equations import settings
from lazyjax.limits.layouts import (
    Atom,
    Axes,
    channels,
    is_wide,
    of_positions,
    positions,
    regroup,
    widths,
)
from lazyjax.limits.nodes import Deterministic, Node, Product, Tokens, Window, now, source
from lazyjax.limits.reading import Reader
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import Fixed, Leaf, Value, Wide, fixed, layout

Operation = Callable[[Reader, Any, list[Value], str], Any]


def _shape_of(equation: Any) -> tuple[int, ...]:
    return tuple(equation.outvars[0].aval.shape)


def _places(axes: Axes) -> list[list[int]]:
    """Give, of each axis, which of the positions of a field are its."""
    found, at = [], 0
    for axis in axes:
        count = sum(a.width is None for a in axis)
        found.append(list(range(at, at + count)))
        at += count
    return found


# --- layouts ---


def _laid_out(value: Fixed | Leaf, operation: Any, shape: tuple[int, ...]) -> Fixed | Leaf:
    """Lay out weights, or what is not random, by an operation on arrays."""
    if isinstance(value, Fixed):
        return layout(value, operation, shape)
    with jax.ensure_compile_time_eval():
        entries = np.asarray(operation(jnp.asarray(value.entries)))

    def of(part: Fixed | None) -> Fixed | None:
        return None if part is None else layout(part, operation, shape)

    return replace(value, entries=entries, factor=of(value.factor), values=of(value.values))


def _reshape(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    (value,), shape = given[:1], _shape_of(equation)
    if not isinstance(value, Wide):
        return _laid_out(value, lambda a: a.reshape(shape), shape)
    axes = regroup(value.axes, shape)
    many = len(value.parts) > 1
    if axes is None or (many and sum(len(a) for a in axes) != sum(len(a) for a in value.axes)):
        refuse("a reshape across positions and channels", "", where)
    return reader.reshaped(value, axes)


def _transpose(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    order = settings(equation).order
    (value,) = given
    if not isinstance(value, Wide):
        return _laid_out(value, lambda a: a.transpose(order), _shape_of(equation))
    places = _places(value.axes)
    own = [p for i in order for p in places[i]]
    axes = tuple(value.axes[i] for i in order)
    if own == sorted(own):
        return Wide(value.parts, axes)
    return reader.moved(value, lambda a: a.transpose(own), axes, ("transpose", tuple(own)))


def _squeeze(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    (value,), shape = given, _shape_of(equation)
    if not isinstance(value, Wide):
        return _laid_out(value, lambda a: a.reshape(shape), shape)
    gone = settings(equation).axes
    return Wide(value.parts, tuple(a for i, a in enumerate(value.axes) if i not in gone))


def _broadcast(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    how = settings(equation)
    return _broadcast_to(reader, given[0], tuple(how.shape), tuple(how.axes))


def _repeat(reader: Reader, shape: Any, given: list[Value], where: str) -> Value:
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
        return _laid_out(value, lambda a: jax.lax.broadcast_in_dim(a, shape, mapping), shape)
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


def _sliced(
    reader: Reader, value: Value, axis: int, start: int, stop: int, stride: int, where: str
) -> Value:
    """Take a part of an array along one axis."""
    length = -(-(stop - start) // stride)
    if (start, stop, stride) == (0, value.shape[axis], 1):
        return value
    shape = (*value.shape[:axis], length, *value.shape[axis + 1 :])
    if not isinstance(value, Wide):
        return _laid_out(value, lambda a: jax.lax.slice_in_dim(a, start, stop, stride, axis), shape)
    if is_wide(value.axes[axis]):
        return _some_channels(reader, value, axis, start, stop, stride, where)
    value = reader.merged(value, axis, where)
    place = sum(len(p) for p in _places(value.axes)[:axis])
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


def _slice(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    how, (value,) = settings(equation), given
    strides = how.strides or (1,) * len(how.starts)
    for axis, (start, stop, stride) in enumerate(zip(how.starts, how.stops, strides, strict=True)):
        value = _sliced(reader, value, axis, int(start), int(stop), int(stride), where)
    return value


def _split(reader: Reader, equation: Any, given: list[Value], where: str) -> list[Value]:
    how, (value,) = settings(equation), given
    ends = np.cumsum(how.sizes)
    return [
        _sliced(reader, value, how.axis, int(end - size), int(end), 1, where)
        for end, size in zip(ends, how.sizes, strict=True)
    ]


def _dynamic_slice(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    value, *starts = given
    numbers = [s.number() if isinstance(s, Fixed) else None for s in starts]
    if any(n is None for n in numbers):
        refuse("a slice whose place is not known", "", where)
    for axis, (n, size) in enumerate(zip(numbers, settings(equation).sizes, strict=True)):
        start = int(min(max(n or 0, 0), value.shape[axis] - size))
        value = _sliced(reader, value, axis, start, start + size, 1, where)
    return value


def pick(reader: Reader, value: Value, index: int, where: str) -> Value:
    """Give one entry along axis 0."""
    one = _sliced(reader, value, 0, index, index + 1, 1, where)
    shape = value.shape[1:]
    if isinstance(one, Wide):
        return Wide(one.parts, one.axes[1:])
    return _laid_out(one, lambda a: a.reshape(shape), shape)


def stacked(reader: Reader, values: list[Value], axis: int, where: str) -> Value:
    """Join arrays along a new axis."""
    shape = (*values[0].shape[:axis], 1, *values[0].shape[axis:])
    raised = [
        Wide(v.parts, (*v.axes[:axis], (), *v.axes[axis:]))
        if isinstance(v, Wide)
        else _laid_out(v, lambda a: a.reshape(shape), shape)
        for v in values
    ]
    return _joined(reader, raised, axis, where)


def _stack(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    return stacked(reader, given, settings(equation).axis, where)


def _flip(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    flipped, (value,) = settings(equation).axes, given
    if not isinstance(value, Wide):
        return _laid_out(value, lambda a: jax.lax.rev(a, flipped), _shape_of(equation))
    for axis in flipped:
        if is_wide(value.axes[axis]):
            refuse("channels in another order", "", where)
        value = reader.merged(value, axis, where)
        for place in _places(value.axes)[axis]:
            value = reader.moved(
                value, lambda a, p=place: jnp.flip(a, p), value.axes, ("flip", place)
            )
    return value


def _concatenate(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    return _joined(reader, given, settings(equation).axis, where)


def _joined(reader: Reader, given: list[Value], axis: int, where: str) -> Value:
    given = [v for v in given if v.shape[axis]]
    if all(isinstance(v, Fixed) for v in given):
        fixeds = [v for v in given if isinstance(v, Fixed)]
        full = [v.full() for v in fixeds]
        sides = []
        for i in range(len(full[0])):
            n = max(f[i].shape[0] for f in full)
            sides.append(
                jnp.concatenate(
                    [jnp.broadcast_to(f[i], (n, *f[i].shape[1:])) for f in full], 1 + axis
                )
            )
        shape = tuple(sides[0].shape[1:])
        return Fixed(tuple(sides), shape, count=fixeds[0].count)
    fields = [v for v in given if isinstance(v, Wide)]
    if not fields or any(isinstance(v, Leaf) for v in given):
        refuse("weights that are joined with others", "Let each enter by itself", where)
    if is_wide(fields[0].axes[axis]):
        return _joined_channels(reader, fields, given, axis, where)
    given = [reader.merged(v, axis, where) if isinstance(v, Wide) else v for v in given]
    lengths = [v.shape[axis] for v in given]
    total = sum(lengths)
    fields = [v for v in given if isinstance(v, Wide)]
    rest = fields[0].axes
    terms: list[Wide] = []
    for v, n in zip(given, lengths, strict=True):
        if isinstance(v, Fixed):
            if v.zero or v.number() == 0:
                continue
            axes = (*rest[:axis], (Atom(n),) if n > 1 else (), *rest[axis + 1 :])
            known = reader.at(v, axes, where)
            node: Node = Deterministic(positions(axes), known)
            v = Wide(tuple((count, node) for count, _ in fields[0].parts), axes)
        assert isinstance(v, Wide)
        terms.append(v)
    axes = (*rest[:axis], (Atom(total),) if total > 1 else (), *rest[axis + 1 :])
    place = sum(len(p) for p in _places(axes)[:axis])
    same = reader.graph.from_one([t.parts for t in terms]) if len(terms) == len(given) else None
    target = positions(axes)
    if same is not None:
        base, maps, keys = same

        def join(a: jax.Array) -> jax.Array:
            parts = []
            for one, n in zip(maps, lengths, strict=True):
                part = one(a)
                parts.append(part.reshape(*target[:place], n, *target[place + 1 :]))
            return jnp.concatenate(parts, place)

        whole = Wide(base, axes)
        return reader.moved(whole, join, axes, ("join", place, keys, tuple(lengths)))
    padded = []
    at = 0
    it = iter(terms)
    for v, n in zip(given, lengths, strict=True):
        skipped = isinstance(v, Fixed) and (v.zero or v.number() == 0)
        if not skipped:
            padded.append(_padded(reader, next(it), axes, place, at, total - at - n, n))
        at += n
    return _added(reader, padded, axes, where)


def _padded(
    reader: Reader, value: Wide, axes: Axes, place: int, low: int, high: int, n: int
) -> Wide:
    """Put positions at their place among others, which are 0."""
    target = positions(axes)

    def put(a: jax.Array) -> jax.Array:
        a = a.reshape(*target[:place], n, *target[place + 1 :])
        edges = [(0, 0, 0)] * len(target)
        edges[place] = (low, high, 0)
        return jax.lax.pad(a, jnp.zeros((), a.dtype), edges)

    return reader.moved(value, put, axes, ("put", place, low, high), fills=True)


def _joined_channels(
    reader: Reader, fields: list[Wide], given: list[Value], axis: int, where: str
) -> Wide:
    alone = all(len(v.axes[axis]) == 1 and sum(map(is_wide, v.axes)) == 1 for v in fields)
    if len(fields) < len(given) or not alone:
        refuse("channels that are joined with what has none", "", where)
    rest = [reader.reshaped(v, v.axes) for v in fields]
    shapes = {tuple(node.shape) for v in rest for _, node in v.parts}
    if len(shapes) > 1:
        refuse("channels whose positions are laid out in different ways", "", where)
    parts = tuple(part for v in rest for part in v.parts)
    atom = reader.new_width(sum(count for count, _ in parts))
    axes = fields[0].axes
    return Wide(parts, (*axes[:axis], (atom,), *axes[axis + 1 :]))


def _along(
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
    place = sum(len(p) for p in _places(axes)[:axis])
    full = (*before[:place], n, *before[place + (n > 1) :])  # with that axis, if n is 1 too
    target = positions(axes)

    def apply(a: jax.Array) -> jax.Array:
        return operation(a.reshape(full), place).reshape(target)

    return reader.moved(value, apply, axes, (key, place), **options)


def _pad(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    value: Any = given[0]
    filling = given[1]
    edges = tuple(settings(equation).edges)
    if not isinstance(value, Wide) or not isinstance(filling, Fixed):
        return None  # type: ignore[return-value]
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
        value = _along(reader, value, axis, length, put, ("pad", edge), where, fills=True)
    return value


# --- what is linear, entry by entry ---


def _same(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    dtype = equation.outvars[0].aval.dtype
    was = equation.invars[0].aval.dtype
    floats = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(was, jnp.floating)
    if not floats:
        return None
    (value,) = given
    if isinstance(value, Fixed):
        return replace(value, sides=tuple(now(lambda a: a.astype(dtype), s) for s in value.sides))
    return value


def _negated(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    return _scaled(reader, given[0], fixed(-1.0, len(reader.moments.sizes)), where)


def _scaled(reader: Reader, value: Value, by: Fixed, where: str) -> Value:
    """Multiply by what is not random."""
    if isinstance(value, Wide):
        known = reader.at(by, value.axes, where)
        return value.map(lambda node: reader.graph.times(node, known))
    if isinstance(value, Leaf):
        one = fixed(np.ones((1,) * len(value.shape), reader.moments.dtype), len(by.sides))
        factor = _multiplied(one if value.factor is None else value.factor, by)
        return replace(value, factor=replace(factor, shape=value.shape))
    return _multiplied(value, by)


def _multiplied(one: Fixed, other: Fixed) -> Fixed:
    rank = max(len(one.shape), len(other.shape))
    shape = np.broadcast_shapes(one.shape, other.shape)
    done: dict[Any, Any] = {}
    sides = []
    for a, b in zip(one.sides, other.sides, strict=True):
        if (id(a), id(b)) not in done:
            a_, b_ = (v.reshape(*v.shape, *(1,) * (1 + rank - v.ndim)) for v in (a, b))
            done[id(a), id(b)] = now(lambda v, w: v * w, a_, b_)
        sides.append(done[id(a), id(b)])
    return replace(one, sides=tuple(sides), shape=tuple(shape), zero=one.zero or other.zero)


def _mul(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    one, other = given
    for value, by in ((one, other), (other, one)):
        if isinstance(value, Fixed) and value.count != 1 and isinstance(by, Fixed):
            return _divided(value, by.number(), where)
    for value, by in ((one, other), (other, one)):
        if isinstance(by, Fixed) and by.count == 1:
            return _scaled(reader, value, by, where)
        if isinstance(value, Wide) and isinstance(by, Leaf) and by.values is not None:
            return _weighted(reader, value, by, where)
    return None


def _divided(value: Fixed, number: float | None, where: str) -> Fixed:
    """Divide a sum over the width by about as much as there is of it."""
    if number is None or abs(number) * value.count > 0.9 * math.sqrt(value.count):
        refuse(
            "a sum over the width that is not divided by about as much, so that what is random in "
            "it stays",
            "Take the mean, or contract the width with weights",
            where,
        )
    factor = number * value.count
    done: dict[int, Any] = {}
    sides = tuple(done.setdefault(id(s), now(lambda a: a * factor, s)) for s in value.sides)
    return replace(value, sides=sides, count=1.0)


def _weighted(reader: Reader, value: Wide, leaf: Leaf, where: str) -> Wide:
    """Multiply by weights that are not random."""
    assert leaf.values is not None
    reader.use(leaf, where)
    pattern = reader.pattern(leaf, value.axes, where)
    known = reader.at(leaf.values, value.axes, where)
    if leaf.factor is not None:
        factor = reader.at(leaf.factor, value.axes, where)
        value = value.map(lambda node: reader.graph.times(node, factor))
    made: list[tuple[int, Node]] = []
    for count, node in value.parts:
        own = pattern if len(value.parts) == 1 else pattern + 0
        made.append((count, reader.graph.scaled(node, known, own)))
    return Wide(tuple(made), value.axes)


def _div(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    one, other = given
    if not isinstance(other, Fixed) or other.count != 1:
        return None
    if isinstance(one, Fixed) and one.count != 1:
        number = other.number()
        return _divided(one, None if not number else 1 / number, where)
    done: dict[int, Any] = {}
    dtype = reader.moments.dtype

    def inverse(side: Any) -> Any:
        return now(lambda a: 1 / jnp.asarray(a, dtype), side)

    sides = tuple(done.setdefault(id(s), inverse(s)) for s in other.sides)
    return _scaled(reader, one, replace(other, sides=sides, zero=False), where)


def _add(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    return _sum(reader, given, where)


def _sub(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    one, other = given
    return _sum(reader, [one, _negated(reader, equation, [other], where)], where)


def _sum(reader: Reader, given: list[Value], where: str) -> Any:
    if all(isinstance(v, Fixed) for v in given):
        return None
    shape = np.broadcast_shapes(*(v.shape for v in given))
    if any(isinstance(v, Wide) for v in given):
        given, axes = reader.together(given, where)
    else:
        axes = reader.axes_of_weights(given, tuple(shape))
    fields = [v for v in given if isinstance(v, Wide)]
    groups = tuple(count for count, _ in fields[0].parts) if fields else (1,)
    terms: list[Wide] = []
    for v in given:
        if isinstance(v, Fixed):
            if v.zero or v.number() == 0:
                continue
            known = _as(reader, reader.at(v, axes, where))
            v = Wide(((channels(axes), Deterministic(positions(axes), known)),), axes)
        elif isinstance(v, Leaf):
            v = Wide(((channels(axes), reader.field_of(v, axes, where)),), axes)
        terms.append(v if len(v.parts) == len(groups) else reader.cut(v, groups))
    return _added(reader, terms, axes, where)


def _as(reader: Reader, known: Any) -> Any:
    return known.map(lambda s: now(lambda a: jnp.asarray(a, reader.moments.dtype), s))


def _added(reader: Reader, terms: list[Wide], axes: Axes, where: str) -> Wide:
    groups = {tuple(count for count, _ in t.parts) for t in terms}
    if len(groups) > 1:
        refuse("fields whose groups of channels are cut at different places", "", where)
    (counts,) = groups
    parts = [
        (count, reader.graph.sum(*(t.parts[i][1] for t in terms))) for i, count in enumerate(counts)
    ]
    return Wide(tuple(parts), axes)


def _select(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    which, *cases = given
    if not isinstance(which, Fixed) or len(cases) != 2 or any(isinstance(c, Leaf) for c in cases):
        return None
    done: dict[int, Any] = {}

    def chosen(value: bool) -> Fixed:
        done.clear()
        dtype = reader.moments.dtype
        sides = tuple(
            done.setdefault(id(s), now(lambda a: (a.astype(bool) == value).astype(dtype), s))
            for s in which.sides
        )
        return replace(which, sides=sides)

    parts = [_scaled(reader, c, chosen(bool(i)), where) for i, c in enumerate(cases)]
    return _sum(reader, parts, where)


# --- sums ---


def _reduce_sum(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
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
    summed = [p for i in gone for p in _places(value.axes)[i]]
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
    places = _places(value.axes)
    own = tuple(p for i in gone for p in places[i])
    axes = tuple(a for i, a in enumerate(value.axes) if i not in gone)
    if not own:
        return Wide(value.parts, axes)
    return reader.moved(value, lambda a: jnp.sum(a, own), axes, ("sum", own), selects=False)


def _reduce_window(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
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

        length = _shape_of(equation)[axis]
        value = _along(reader, value, axis, length, pool, ("pool", window), where, selects=False)
    return value


# --- products ---


def _scalar_of(reader: Reader, leaf: Leaf, where: str) -> Any:
    """Give the number that weights are multiplied by before a product."""
    if leaf.variance is None:
        refuse(
            f"the matrix {leaf.name}, which is not random",
            "Give it a variance, or keep it in f as a constant",
            where,
        )
    if leaf.factor is None:
        return 1.0
    same = all(s.size == 1 for s in leaf.factor.sides)
    number = leaf.factor.number()
    if number is not None:
        return number
    if not same or any(s is not leaf.factor.sides[0] for s in leaf.factor.sides):
        refuse(f"the weight {leaf.name} times numbers that differ", "", where)
    return jnp.asarray(leaf.factor.sides[0]).reshape(()).astype(reader.moments.dtype)


def _as_wide(reader: Reader, value: Value, where: str) -> Wide:
    if isinstance(value, Wide):
        return value
    assert isinstance(value, Fixed)
    axes = of_positions(value.shape)
    node = Deterministic(positions(axes), _as(reader, reader.at(value, axes, where)))
    return Wide(((1, node),), axes)


def _fresh(reader: Reader, leaf: Leaf, where: str) -> None:
    """Require that the entries of a matrix are all different weights, and take them."""
    if np.unique(leaf.entries).size != leaf.entries.size:
        refuse(f"the weight {leaf.name}, some entries of which stand at several places", "", where)
    reader.use(leaf, where)


def _contractible(reader: Reader, x: Wide, gone: list[int], stays: list[int], where: str) -> None:
    """Require that a product sums over all channels of what is random."""
    for i, axis in enumerate(x.axes):
        if i not in gone and i not in stays and is_wide(axis):
            refuse("a product that leaves channels as they are", "Contract all of the width", where)
    if x.random and not any(is_wide(x.axes[i]) for i in gone):
        refuse(
            "a product of what is random that sums over no width",
            "Let weights sum over a wide axis",
            where,
        )
    if x.random:
        reader.contracted |= {a.width for i in gone for a in x.axes[i] if a.width is not None}


def _dot(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    (contracted, shared) = settings(equation).numbers
    kinds = [isinstance(v, Leaf) for v in given]
    if all(kinds):
        refuse("a product of two weights", "Multiply the input by one after the other", where)
    if not any(kinds):
        return _dot_of_fields(reader, equation, given, where)
    at = kinds.index(True)
    leaf, x = given[at], _as_wide(reader, given[1 - at], where)
    assert isinstance(leaf, Leaf)
    factor = _scalar_of(reader, leaf, where)
    _fresh(reader, leaf, where)
    gone, stays = list(contracted[1 - at]), list(shared[1 - at])
    _contractible(reader, x, gone, stays, where)
    taken = {*contracted[at], *shared[at]}
    new: Axes = tuple(
        (reader.new_width(n),) if n > 1 else () for i, n in enumerate(leaf.shape) if i not in taken
    )
    places = _places(x.axes)
    free = [i for i in range(len(x.axes)) if i not in (*gone, *stays)]
    kept = [p for i in (*stays, *free) for p in places[i]]
    batch = tuple(
        tuple(a if a.width is None else reader.new_width(a.length) for a in x.axes[i])
        for i in stays
    )
    rest = tuple(x.axes[i] for i in free)
    axes = (*batch, *new, *rest) if at == 0 else (*batch, *rest, *new)
    own = tuple(range(sum(len(places[i]) for i in stays)))
    counted = math.prod(a.length for i in gone for a in x.axes[i] if a.width is not None)
    if len(x.parts) > 1 and any(is_wide(x.axes[i]) for i in stays):
        refuse("groups of channels in a product of several", "", where)
    total = sum(n for n, _ in x.parts)
    terms = tuple(
        (counted if len(x.parts) == 1 else counted * n // total, node) for n, node in x.parts
    )
    summed = tuple(p for i in gone for p in places[i])
    shape = positions(axes)
    node = source(Product, shape, terms, summed, tuple(kept), (), own, leaf.variance, factor)
    return Wide(((channels(axes), node),), axes)


def _dot_of_fields(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Mix positions by a matrix that is not random."""
    fields = [isinstance(v, Wide) for v in given]
    if all(fields):
        refuse(
            "a product of two fields, as the logits of attention are, which stays random at "
            "1 / sqrt(d)",
            "",
            where,
        )
    at = fields.index(True)
    x, matrix = given[at], given[1 - at]
    assert isinstance(x, Wide)
    if not isinstance(matrix, Fixed) or matrix.count != 1:
        return None
    (contracted, shared) = settings(equation).numbers
    for i in (*contracted[at], *shared[at]):
        x = reader.merged(x, i, where)
    places = _places(x.axes)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = {p: next(letters) for axis in places for p in axis}
    own = [None] * len(matrix.shape)
    for i, j in (
        *zip(contracted[at], contracted[1 - at], strict=True),
        *zip(shared[at], shared[1 - at], strict=True),
    ):
        own[j] = names[places[i][0]] if places[i] else next(letters)  # type: ignore[call-overload]
    own = [c or next(letters) for c in own]  # type: ignore[misc]
    stays = list(shared[at])
    free = [i for i in range(len(x.axes)) if i not in (*contracted[at], *stays)]
    others = [
        j for j in range(len(matrix.shape)) if j not in (*contracted[1 - at], *shared[1 - at])
    ]
    batch = tuple(x.axes[i] for i in stays)
    rest = tuple(x.axes[i] for i in free)
    new = of_positions(tuple(matrix.shape[j] for j in others))
    axes = (*batch, *rest, *new) if at == 0 else (*batch, *new, *rest)
    out_rest = [names[p] for i in free for p in places[i]]
    out_new = [own[j] for j in others if matrix.shape[j] > 1]
    out_batch = [names[p] for i in stays for p in places[i]]
    out = [*out_batch, *(out_rest + out_new if at == 0 else out_new + out_rest)]
    spec = f"{''.join(names[p] for axis in places for p in axis)},{''.join(own)}->{''.join(out)}"  # type: ignore[arg-type]
    full = Fixed(matrix.full(), matrix.shape)
    known = _as(reader, reader.at(full, of_positions(matrix.shape), where))
    sizes = matrix.shape

    def mix(a: jax.Array, m: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, m.reshape(sizes), precision="highest")

    return reader.moved(x, mix, axes, ("mix", spec), selects=False, mix=known)


def _convolution(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    how = settings(equation)
    inputs, leaf = given
    if not isinstance(leaf, Leaf) or isinstance(inputs, Leaf):
        refuse("a convolution whose filters are no weights", "", where)
    x = _as_wide(reader, inputs, where)
    numbers = how.numbers
    batch, feature, *spatial = numbers.lhs_spec
    if x.axes[batch] or how.batch_groups != 1:
        refuse("a convolution over a batch that is not that of the examples", "", where)
    for i in spatial:
        x = reader.merged(x, i, where)
    if how.groups > 1 and (
        not is_wide(x.axes[feature]) or len(x.parts) > 1 or x.shape[feature] == how.groups
    ):
        refuse(
            "a convolution in groups that sum over no width",
            "Use groups of several channels of a field",
            where,
        )
    factor = _scalar_of(reader, leaf, where)
    _fresh(reader, leaf, where)
    _contractible(reader, x, [feature], [], where)
    # one axis of positions for each of the window, those of length 1 too
    dims: list[int] = []
    place: dict[int, int] = {}
    summed: list[int] = []
    for i, axis in enumerate(x.axes):
        if i in spatial:
            place[i] = len(dims)
            dims.append(x.shape[i])
        else:
            for atom in axis:
                if atom.width is None:
                    summed.append(len(dims))
                    dims.append(atom.length)
    x = reader.reshaped(x, x.axes, tuple(dims))
    out = _shape_of(equation)
    order = sorted(range(len(spatial)), key=lambda s: numbers.out_spec[2 + s])
    kept = tuple(place[spatial[s]] for s in order)
    windows = tuple(
        Window(
            leaf.shape[numbers.rhs_spec[2 + s]],
            how.strides[s],
            tuple(how.padding[s]),
            how.input_steps[s],
            how.filter_steps[s],
        )
        for s in order
    )
    lengths = tuple(out[numbers.out_spec[2 + s]] for s in order)
    counted = math.prod(a.length for a in x.axes[feature] if a.width is not None)
    total = sum(n for n, _ in x.parts)
    terms = tuple(
        ((counted if len(x.parts) == 1 else counted * n // total) // how.groups, node)
        for n, node in x.parts
    )
    node = source(Product, lengths, terms, tuple(summed), kept, windows, (), leaf.variance, factor)
    axes: list[Any] = [()] * len(out)
    for s, n in zip(order, lengths, strict=True):
        axes[numbers.out_spec[2 + s]] = (Atom(n),) if n > 1 else ()
    width = out[numbers.out_spec[1]]
    axes[numbers.out_spec[1]] = (reader.new_width(width),) if width > 1 else ()
    return reader.reshaped(Wide(((width, node),), tuple(axes)), tuple(axes))


def _gather(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Look up rows of a table of weights."""
    table, places = given
    how = settings(equation)
    if not isinstance(table, Leaf) or not isinstance(places, Fixed):
        return None
    numbers = how.numbers
    simple = (
        tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(how.sizes) == (1, *table.shape[1:])
        and table.variance is not None
    )
    if not simple:
        refuse(f"a lookup in the weight {table.name} that is not of its rows", "", where)
    factor = _scalar_of(reader, table, where)
    _fresh(reader, table, where)
    out = _shape_of(equation)
    axes: list[Any] = []
    for i, n in enumerate(out):
        wide = i in numbers.offset_dims
        axes.append(((reader.new_width(n),) if wide else (Atom(n),)) if n > 1 else ())
    rows = layout(places, lambda a: a.reshape(a.shape[:-1]), places.shape[:-1])
    rows = layout(rows, lambda a: jnp.clip(a, 0, table.shape[0] - 1), rows.shape)
    known = reader.at(rows, of_positions(rows.shape), where)
    node = source(Tokens, positions(tuple(axes)), known, table.variance, factor)
    return Wide(((channels(tuple(axes)), node),), tuple(axes))


def _scan(reader: Reader, equation: Any, given: list[Value], where: str) -> list[Value]:
    """Read a scan turn by turn: each has its own slices of stacked weights."""
    scan = settings(equation)
    outside, over = given[: scan.constants], given[scan.constants + scan.carries :]
    carry = given[scan.constants : scan.constants + scan.carries]
    turns = range(scan.length)
    made: list[list[Value]] = []
    for i in reversed(turns) if scan.reverse else turns:
        now = [pick(reader, v, i, where) for v in over]
        out = reader.read(scan.body, [*outside, *carry, *now])
        carry = out[: scan.carries]
        made.append(out[scan.carries :])
    if scan.reverse:
        made.reverse()
    return [*carry, *(stacked(reader, list(each), 0, where) for each in zip(*made, strict=True))]


OPERATIONS: dict[str, Operation] = {
    "scan": _scan,
    "repeat": _repeat,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "rev": _flip,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "convert_element_type": _same,
    "reduce_precision": _same,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "neg": _negated,
    "mul": _mul,
    "div": _div,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "select_n": _select,
    "reduce_sum": _reduce_sum,
    "reduce_window_sum": _reduce_window,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
"""By primitive: what is given back is what it makes, or None, where that is not known here."""
