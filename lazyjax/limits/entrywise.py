"""Operations entry by entry that are linear in what is random."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from lazyjax.limits.layouts import Axes, channels, positions
from lazyjax.limits.nodes import Deterministic, Node, now
from lazyjax.limits.reading import Reader
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import Fixed, Leaf, Value, Wide, fixed


def same(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Change the type among floats; the copy of an array."""
    dtype = equation.outvars[0].aval.dtype
    was = equation.invars[0].aval.dtype
    floats = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(was, jnp.floating)
    if not floats:
        return None
    (value,) = given
    if isinstance(value, Fixed):
        return replace(value, sides=tuple(now(lambda a: a.astype(dtype), s) for s in value.sides))
    return value


def negate(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Negate."""
    return scaled(reader, given[0], fixed(-1.0, len(reader.moments.sizes)), where)


def scaled(reader: Reader, value: Value, by: Fixed, where: str) -> Value:
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


def multiply(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Multiply by what is not random, or by weights that are not."""
    one, other = given
    for value, by in ((one, other), (other, one)):
        if isinstance(value, Fixed) and value.count != 1 and isinstance(by, Fixed):
            return _divided(value, by.number(), where)
    for value, by in ((one, other), (other, one)):
        if isinstance(by, Fixed) and by.count == 1:
            return scaled(reader, value, by, where)
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


def divide(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Divide by what is not random."""
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
    return scaled(reader, one, replace(other, sides=sides, zero=False), where)


def add(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Add fields, weights and what is not random."""
    return _sum(reader, given, where)


def subtract(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Subtract."""
    one, other = given
    return _sum(reader, [one, negate(reader, equation, [other], where)], where)


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
            known = of_kind(reader, reader.at(v, axes, where))
            v = Wide(((channels(axes), Deterministic(positions(axes), known)),), axes)
        elif isinstance(v, Leaf):
            v = Wide(((channels(axes), reader.field_of(v, axes, where)),), axes)
        terms.append(v if len(v.parts) == len(groups) else reader.cut(v, groups))
    return added(reader, terms, axes, where)


def of_kind(reader: Reader, known: Any) -> Any:
    """Give numbers the dtype of the kernels."""
    return known.map(lambda s: now(lambda a: jnp.asarray(a, reader.moments.dtype), s))


def added(reader: Reader, terms: list[Wide], axes: Axes, where: str) -> Wide:
    """Add fields that have the same axes, group by group of their channels."""
    groups = {tuple(count for count, _ in t.parts) for t in terms}
    if len(groups) > 1:
        refuse("fields whose groups of channels are cut at different places", "", where)
    (counts,) = groups
    parts = [
        (count, reader.graph.sum(*(t.parts[i][1] for t in terms))) for i, count in enumerate(counts)
    ]
    return Wide(tuple(parts), axes)


def select(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Choose by a mask that is not random."""
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

    parts = [scaled(reader, c, chosen(bool(i)), where) for i, c in enumerate(cases)]
    return _sum(reader, parts, where)
