"""Arrays joined along an axis: of positions, of channels, of turns."""

from typing import Any

import jax
import jax.numpy as jnp

from lazyjax.equations import settings
from lazyjax.limits.entrywise import added
from lazyjax.limits.layouts import Atom, Axes, is_wide, places_of, positions
from lazyjax.limits.moving import laid_out
from lazyjax.limits.nodes import Deterministic, Node
from lazyjax.limits.reading import Reader
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import Fixed, Leaf, Value, Wide


def stacked(reader: Reader, values: list[Value], axis: int, where: str) -> Value:
    """Join arrays along a new axis."""
    shape = (*values[0].shape[:axis], 1, *values[0].shape[axis:])
    raised = [
        Wide(v.parts, (*v.axes[:axis], (), *v.axes[axis:]))
        if isinstance(v, Wide)
        else laid_out(v, lambda a: a.reshape(shape), shape)
        for v in values
    ]
    return _joined(reader, raised, axis, where)


def stack(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Join arrays along a new axis."""
    return stacked(reader, given, settings(equation).axis, where)


def concatenate(reader: Reader, equation: Any, given: list[Value], where: str) -> Value:
    """Join arrays along an axis."""
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
    place = sum(len(p) for p in places_of(axes)[:axis])
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
    return added(reader, padded, axes, where)


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
