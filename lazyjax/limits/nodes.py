"""What a network is in the limit: a graph of fields over its channels.

A node stands for an array of a network whose channels are alike and independent of each other: what
it holds at its positions, of one channel. All that is random in it comes from sources, Gaussian and
independent of each other; linear nodes combine them, pointwise ones are functions of them. Nothing
is computed here: `moments` asks nodes for their covariances.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lazyjax.limits.refusals import refuse

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Known:
    """A value that is not random: of each side, x1 and x2, an array (n or 1, *positions)."""

    sides: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The positions."""
        return self.sides[0].shape[1:]

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Known":
        """Apply a function to both sides, once where they are one."""
        done: dict[int, jax.Array] = {}
        for side in self.sides:
            if id(side) not in done:
                done[id(side)] = function(side)
        return Known(tuple(done[id(side)] for side in self.sides))


class Query(NamedTuple):
    """Which pairs are asked for."""

    left: int  # the side: 0 of x1, 1 of x2
    right: int
    crossed: bool  # every example of the one with every one of the other; else with itself
    every: bool  # every position with every other; else with itself


@dataclass(frozen=True, eq=False)
class Node:
    """Base of all nodes: `shape` are positions, `sources` the numbers of what is random in it."""

    shape: tuple[int, ...]
    sources: frozenset[int] = field(default=frozenset(), kw_only=True)
    gaussian: bool = field(default=False, kw_only=True)  # jointly, of mean 0


@dataclass(frozen=True, eq=False)
class Deterministic(Node):
    """The same in every channel, and not random."""

    value: Known


@dataclass(frozen=True, eq=False)
class Source(Node):
    """A Gaussian field of fresh weights; of each variance `part` names the channels."""

    part: tuple[Any, ...]

    def of(self, part: tuple[Any, ...]) -> "Source":
        """Give other channels of the same field, independent of these."""
        return _fresh(self, part=part)


def _fresh(source: Any, **changes: Any) -> Any:
    fields = {k: getattr(source, k) for k in source.__dataclass_fields__} | changes
    fields["sources"] = frozenset({next(_numbers)})
    return type(source)(**fields)


@dataclass(frozen=True, eq=False)
class Product(Source):
    """A product with fresh weights W of some variance, z = factor * sum_i W_i h_i.

    `terms` are what is contracted: how many channels, and of which field. Positions in `summed`
    are contracted too; those in `kept` stay, in this order; `windows` sums over the window of a
    convolution; along `own` every position has weights of its own.
    """

    terms: tuple[tuple[int, Node], ...]
    summed: tuple[int, ...]
    kept: tuple[int, ...]
    windows: tuple["Window", ...]
    own: tuple[int, ...]
    variance: float
    factor: Any


@dataclass(frozen=True)
class Window:
    """The window of a convolution along one axis of positions."""

    size: int
    stride: int
    padding: tuple[int, int]
    input_step: int
    step: int


@dataclass(frozen=True, eq=False)
class Entries(Source):
    """Weights themselves, as a bias: `pattern` numbers the entries, equal where they are one.

    With variance None they are not random, of value 0 (`Deterministic` has what they are), and only
    differentiated.
    """

    pattern: np.ndarray
    variance: float | None
    factor: Known


@dataclass(frozen=True, eq=False)
class Tokens(Source):
    """Rows of a table of fresh weights: `value` are the numbers of the rows."""

    value: Known
    variance: float
    factor: Any


@dataclass(frozen=True, eq=False)
class Sum(Node):
    """A sum of fields."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Times(Node):
    """A field times what is not random."""

    inner: Node
    value: Known


@dataclass(frozen=True, eq=False)
class Scaled(Node):
    """A field times weights, one a channel, that are not random but differentiated."""

    inner: Node
    value: Known
    pattern: np.ndarray


@dataclass(frozen=True, eq=False)
class Moved(Node):
    """A linear map of the positions; with the same `key` it is the same map.

    `mix` is a matrix of each side by which positions are mixed, None where it is the same always.
    """

    inner: Node
    operation: Callable[..., jax.Array]
    key: Any
    selects: bool  # each position is one of those of `inner`, or 0
    mix: Known | None


@dataclass(frozen=True, eq=False)
class Pointwise(Node):
    """A function of the fields and of what is not random, entry by entry."""

    arguments: tuple[Any, ...]  # Node or Known
    function: Callable[..., jax.Array]
    name: str


def source(kind: type, shape: tuple[int, ...], *arguments: Any) -> Any:
    """Make a source that is independent of all others."""
    own = frozenset({next(_numbers)})
    return kind(shape, ("all",), *arguments, sources=own, gaussian=True)


def scales(a: Node) -> list[tuple[np.ndarray, Node]]:
    """Give, of a linear field, the patterns of its scales and the derivative by each.

    Maps of positions move both; what is multiplied later multiplies the derivative.
    """
    match a:
        case Sum():
            return [pair for term in a.terms for pair in scales(term)]
        case Times():
            return [
                (p, Times(a.shape, w, a.value, sources=w.sources, gaussian=w.gaussian))
                for p, w in scales(a.inner)
            ]
        case Scaled():
            inner = [
                (p, Scaled(a.shape, w, a.value, a.pattern, sources=w.sources, gaussian=w.gaussian))
                for p, w in scales(a.inner)
            ]
            return [(a.pattern, a.inner), *inner]
        case Moved():
            if scales(a.inner):
                refuse("positions that are mixed after a scale that is differentiated", "")
    return []


def same_entries(one: np.ndarray, other: np.ndarray, q: Query, dtype: Any) -> jax.Array:
    """Tell which entries of two patterns are the same, (1, 1, *positions, *positions)."""
    batch = (1, 1) if q.crossed else (1,)
    if np.all(one == one.reshape(-1)[0]) and np.all(other == one.reshape(-1)[0]):
        return jnp.ones((*batch, *(1,) * (one.ndim * (1 + q.every))), dtype)
    if not q.every:
        return jnp.asarray(one == other, dtype).reshape(*batch, *one.shape)
    same = one.reshape(-1)[:, None] == other.reshape(-1)[None]
    return jnp.asarray(same.reshape(*batch, *one.shape, *other.shape), dtype)


def now(function: Callable[..., Any], *arrays: Any) -> Any:
    """Compute at once what depends on nothing that is traced, and keep it on the host.

    There it stays known: what JAX does with its arrays inside of a trace is traced.
    """
    if any(isinstance(a, Tracer) for a in arrays):
        return function(*arrays)
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, function(*arrays))


def product_of(one: Known, other: Known) -> Known:
    """Multiply two values, entry by entry."""
    done: dict[tuple[int, int], jax.Array] = {}
    sides = []
    for a, b in zip(one.sides, other.sides, strict=True):
        if (id(a), id(b)) not in done:
            done[id(a), id(b)] = a * b
        sides.append(done[id(a), id(b)])
    return Known(tuple(sides))
