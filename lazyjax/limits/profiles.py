"""Functions of Gaussian fields: of which ones, where they have kinks, whether a closed form."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lazyjax.limits.closed import Family, Polynomial, recognise
from lazyjax.limits.nodes import Deterministic, Known, Node, Pointwise, Scaled, Sum, Times
from lazyjax.limits.refusals import refuse

Read = Callable[[Known], jax.Array]

_COMPARED = {"max", "min", "gt", "ge", "lt", "le", "eq", "ne"}


def _fields(node: Any, top: bool) -> list[Node]:
    """Give the Gaussian fields that a node is a function of, once each.

    With `top` the first on the way down; without, what is left of those without their factors.
    """
    if isinstance(node, Known | Deterministic):
        return []
    if node.gaussian and (top or not isinstance(node, Times)):
        return [node]
    match node:
        case Times():
            inside = [node.inner]
        case Sum():
            inside = list(node.terms)
        case Pointwise():
            inside = list(node.arguments)
        case Scaled():
            refuse("an activation of an activation that weights scale", "Put a product between")
        case _:
            refuse(
                "an activation of activations whose positions were mixed", "Put a product between"
            )
    found: dict[int, Node] = {}
    for part in inside:
        found |= {id(field): field for field in _fields(part, top)}
    return list(found.values())


def _value(node: Any, fields: dict[int, jax.Array], read: Read) -> jax.Array:
    if isinstance(node, Known):
        return read(node)
    if id(node) in fields:
        return fields[id(node)]
    match node:
        case Deterministic():
            return read(node.value)
        case Times():
            return _value(node.inner, fields, read) * read(node.value)
        case Sum():
            values = [_value(term, fields, read) for term in node.terms]
            return sum(values[1:], values[0])
        case Pointwise():
            return node.function(*(_value(a, fields, read) for a in node.arguments))
    raise AssertionError(node)


def _pointwise(node: Any) -> list[Pointwise]:
    """Give the functions that a node is made of."""
    match node:
        case Pointwise():
            return [node, *(p for a in node.arguments for p in _pointwise(a))]
        case Times():
            return _pointwise(node.inner)
        case Sum():
            return [p for term in node.terms for p in _pointwise(term)]
    return []


def _constant(known: Known) -> jax.Array:
    """Give the number that a known value is, everywhere."""
    side = known.sides[0]
    if isinstance(side, Tracer):
        raise _NoNumber
    values = np.asarray(side)
    if values.size and np.ptp(values.astype(float)):
        raise _NoNumber
    return jnp.asarray(values.reshape(-1)[0])


class _NoNumber(Exception):
    """A known value is not one number."""


def _polynomial(node: Any, field: Node) -> np.ndarray | None:
    """Give the coefficients of a polynomial of one field; None if it is no polynomial."""
    if node is field:
        return np.array([0.0, 1.0])
    if isinstance(node, Deterministic | Known):
        with jax.ensure_compile_time_eval():
            value = _constant(node.value if isinstance(node, Deterministic) else node)
        return np.array([float(value)])
    if isinstance(node, Times):
        inner = _polynomial(node.inner, field)
        with jax.ensure_compile_time_eval():
            return None if inner is None else inner * float(_constant(node.value))
    if isinstance(node, Sum):
        parts: list[Any] = [_polynomial(term, field) for term in node.terms]
    elif isinstance(node, Pointwise):
        parts = [_polynomial(a, field) for a in node.arguments]
    else:
        return None
    if any(part is None for part in parts):
        return None
    if isinstance(node, Sum):
        total = np.zeros(1)
        for part in parts:
            total = np.polynomial.polynomial.polyadd(total, part)
        return total
    name, _, power = node.name.partition(":")
    if name == "integer_pow" and int(power) >= 0:
        return np.polynomial.polynomial.polypow(parts[0], int(power))
    if name == "square":
        return np.polynomial.polynomial.polymul(parts[0], parts[0])
    if name == "mul":
        return np.polynomial.polynomial.polymul(*parts)
    return None


@dataclass(frozen=True, eq=False)
class Profile:
    """A function of Gaussian fields; its j-th derivative for each j in `by`."""

    node: Pointwise
    fields: tuple[Node, ...]
    by: tuple[int, ...] = ()
    times: int | None = None  # the field that it is multiplied by

    def derivative(self, j: int) -> "Profile":
        """Give the derivative by a field."""
        return replace(self, by=(*self.by, j))

    def function(self, read: Read) -> Callable[..., jax.Array]:
        """Give the function of the fields' values."""

        def value(*z: jax.Array) -> jax.Array:
            shape = jnp.broadcast_shapes(*(v.shape for v in z))
            z = tuple(jnp.broadcast_to(v, shape) for v in z)
            ids = [id(field) for field in self.fields]
            out = _value(self.node, dict(zip(ids, z, strict=True)), read)
            return jnp.broadcast_to(out, jnp.broadcast_shapes(out.shape, shape))

        derived = value
        for j in self.by:
            derived = _derived(derived, j)
        j = self.times
        return derived if j is None else lambda *z: z[j] * derived(*z)

    @cached_property
    def family(self) -> Family | None:
        """The closed form that it has, as a function of one field."""
        if len(self.fields) != 1:
            return None
        (field,) = self.fields
        try:
            coefficients = _polynomial(self.node, field)
            if coefficients is not None:
                return Polynomial(tuple(map(float, coefficients)))
            names = {p.name for p in _pointwise(self.node)}
            plain = replace(self, by=(), times=None)
            return recognise(plain.function(_constant), names)
        except _NoNumber:
            return None

    @cached_property
    def _known_kinks(self) -> list[float] | None:
        """Where comparisons change, found by bisection; None where constants are not known."""
        found: set[float] = set()
        ids = id(self.fields[0])
        z = np.concatenate([-_SIZES[::-1], [0.0], _SIZES])
        for p in self._compared():
            one, other = p.arguments if p.name in _COMPARED else (p.arguments[0], None)

            def side(at: np.ndarray, one: Any = one, other: Any = other) -> np.ndarray:
                values = {ids: jnp.asarray(at, jnp.result_type(float))}
                value = _value(one, values, _constant)
                if other is not None:
                    value = value - _value(other, values, _constant)
                return np.sign(np.broadcast_to(np.asarray(value), at.shape))

            try:
                with jax.ensure_compile_time_eval():
                    found |= set(_changes(side, z))
            except _NoNumber:
                return None
        return sorted(found)

    def _compared(self) -> list[Pointwise]:
        kinds = (*_COMPARED, "abs", "sign")
        return [p for p in _pointwise(self.node) if p.name in kinds]

    def kinks(self, read: Read) -> list[Any] | None:
        """Give the values of its field at which it is not smooth; None where they are not known."""
        if len(self.fields) != 1 or not self._compared():
            return []
        if self._known_kinks is not None:
            return list(self._known_kinks)
        found: list[jax.Array] = []
        ids = id(self.fields[0])
        for p in self._compared():
            one, other = p.arguments if p.name in _COMPARED else (p.arguments[0], None)
            if any(_pointwise(a) for a in (one, other)):
                return None

            def at(z: float, one: Any = one, other: Any = other) -> jax.Array:
                values = {ids: jnp.asarray(z, jnp.result_type(float))}
                value = _value(one, values, read)
                return value if other is None else value - _value(other, values, read)

            start, slope = at(0.0), at(1.0) - at(0.0)
            found.append(jnp.where(slope == 0, jnp.inf, -start / jnp.where(slope == 0, 1, slope)))
        return found


_SIZES = np.logspace(-9, 2.5, 600)


def _changes(sign: Callable[[np.ndarray], np.ndarray], z: np.ndarray) -> list[float]:
    """Find where a sign changes, between entries of z, by bisection."""
    signs = sign(z)
    (at,) = np.nonzero(signs[1:] != signs[:-1])
    if not at.size:
        return []
    low, high, left = z[at], z[at + 1], signs[at]
    for _ in range(80):
        middle = (low + high) / 2
        same = sign(middle) == left
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return [0.0 if abs(v) < 1e-8 else float(v) for v in (low + high) / 2]


def _derived(function: Callable[..., jax.Array], j: int) -> Callable[..., jax.Array]:
    """Differentiate by the j-th argument, entry by entry."""

    def derivative(*z: jax.Array) -> jax.Array:
        def of(v: jax.Array) -> jax.Array:
            return function(*z[:j], v, *z[j + 1 :])

        value, pullback = jax.vjp(of, z[j])
        return pullback(jnp.ones_like(value))[0]

    return derivative


def profile_of(node: Pointwise) -> Profile:
    """Find the Gaussian fields of a function."""
    fields = _fields(node, True)
    if len(fields) > 1:
        fields = _fields(node, False)
    return Profile(node, tuple(fields))
