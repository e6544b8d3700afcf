"""What an array of a network is, as its operations are read: known, weights, or a field."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lazyjax.limits.layouts import Axes
from lazyjax.limits.nodes import Known, Node, now
from lazyjax.limits.refusals import refuse


@dataclass(frozen=True, eq=False)
class Fixed:
    """An array that is not random.

    Of each side (n or 1, *shape), with axes of length 1 where it is the same all along. A `count`
    above 1 says that it is a mean over so many channels of which the sum was asked: until it is
    divided by about as many it has no limit.
    """

    sides: tuple[Any, ...]
    shape: tuple[int, ...]
    count: float = 1.0
    zero: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether it is known now, and the same for every example."""
        return all(not isinstance(s, Tracer) and s.shape[0] == 1 for s in self.sides)

    def full(self) -> tuple[jax.Array, ...]:
        """Give both sides with all their entries."""

        def whole(side: Any) -> Any:
            return jnp.broadcast_to(raised(side, len(self.shape)), (len(side), *self.shape))

        return tuple(now(whole, side) for side in self.sides)

    def number(self) -> float | None:
        """Give the one number that it is; None where it is more, or not known."""
        if not self.is_constant or self.count != 1:
            return None
        values = np.asarray(self.sides[0])
        same = values.size > 0 and np.all(values == values.reshape(-1)[0])
        return float(values.reshape(-1)[0]) if same else None


def raised(side: Any, rank: int) -> Any:
    """Give one number for each example as an array of some rank."""
    return side if side.ndim > 1 else side.reshape(side.shape[0], *(1,) * rank)


@dataclass(frozen=True, eq=False)
class Leaf:
    """Weights, laid out: `entries` numbers them, over all leaves; times `factor`."""

    entries: np.ndarray
    name: str
    variance: float | None
    factor: Fixed | None = None
    values: Fixed | None = None  # where they are not random

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.entries.shape


@dataclass(frozen=True, eq=False)
class Wide:
    """A field: of each group of channels how many there are, and what one holds."""

    parts: tuple[tuple[int, Node], ...]
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(int(np.prod([a.length for a in axis], dtype=int)) for axis in self.axes)

    @property
    def random(self) -> bool:
        """Whether anything in it is."""
        return any(node.sources for _, node in self.parts)

    def map(self, function: Callable[[Node], Node], axes: Axes | None = None) -> "Wide":
        """Apply a function to each group of channels."""
        parts = tuple((count, function(node)) for count, node in self.parts)
        return Wide(parts, self.axes if axes is None else axes)


Value = Fixed | Leaf | Wide


def fixed(value: Any, sides: int = 2) -> Fixed:
    """Give a number or an array that is the same for every example."""
    array = value if isinstance(value, Tracer) else np.asarray(value)
    return Fixed((array[None],) * sides, tuple(array.shape))


def layout(value: Fixed, operation: Callable[[jax.Array], jax.Array], shape: Any) -> Fixed:
    """Lay out anew what is not random."""
    done: dict[int, jax.Array] = {}
    sides = []
    for part, full in zip(value.sides, value.full(), strict=True):
        if id(part) not in done:
            done[id(part)] = now(lambda a: jax.vmap(operation)(jnp.asarray(a)), full)
        sides.append(done[id(part)])
    return replace(value, sides=tuple(sides), shape=tuple(shape))


def at_positions(value: Fixed, axes: Axes, *, trusted: bool, where: str) -> Known:
    """Give what is not random at the positions of a field, of any one channel.

    `trusted` says that it has been seen to be the same in all channels.
    """
    if value.count != 1:
        refuse("a sum over the width that is not divided by about as much", "Take the mean", where)
    done: dict[int, jax.Array] = {}
    for side in value.sides:
        if id(side) in done:
            continue
        array = raised(side, len(axes))
        at = 1  # the axis that is looked at
        for axis in axes:
            if array.shape[at] == 1:
                places = sum(a.width is None for a in axis)
                array = array.reshape(*array.shape[:at], *(1,) * places, *array.shape[at + 1 :])
                at += places
                continue
            lengths = [a.length for a in axis]
            array = array.reshape(*array.shape[:at], *lengths, *array.shape[at + 1 :])
            for atom in axis:
                if atom.width is None:
                    at += 1
                else:
                    array = _one_channel(array, at, trusted, where)
        done[id(side)] = array
    return Known(tuple(done[id(side)] for side in value.sides))


def _one_channel(array: jax.Array, axis: int, trusted: bool, where: str) -> jax.Array:
    if not trusted:
        if isinstance(array, Tracer):
            refuse("what depends on the input, or is traced, along the width", "", where)
        values = np.asarray(array)
        if not np.all(values == np.take(values, [0], axis)):
            refuse("numbers that differ from channel to channel", "", where)
    return now(lambda a: jax.lax.index_in_dim(jnp.asarray(a), 0, axis, keepdims=False), array)
