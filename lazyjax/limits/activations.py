"""The expectations of functions of Gaussian fields: closed forms first, then quadrature."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lazyjax.limits import quadrature
from lazyjax.limits.closed import Covariances, Family, Piecewise, Polynomial, recognise
from lazyjax.limits.nodes import (
    Deterministic,
    Entries,
    Known,
    Node,
    Pointwise,
    Query,
    Scaled,
    Sum,
    Times,
    same_entries,
    scales,
)
from lazyjax.limits.refusals import refuse

Read = Callable[[Known], jax.Array]

_GRID = 2**16  # nodes of a grid over several fields
_MOST = 2**36  # values of a function on all of them
_COMPARED = {"max", "min", "gt", "ge", "lt", "le", "eq", "ne"}
_SMOOTH_CUSTOM = "logaddexp"


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


def profile(node: Pointwise) -> Profile:
    """Find the Gaussian fields of a function."""
    fields = _fields(node, True)
    if len(fields) > 1:
        fields = _fields(node, False)
    return Profile(node, tuple(fields))


def _reader(moments: Any, q: Any, right: bool, new: int) -> Read:
    """Give known values as the query has pairs, with some new axes in front."""

    def read(known: Known) -> jax.Array:
        value = moments.spread(known.sides[q.right if right else q.left], q, right)
        return value.reshape(*(1,) * new, *value.shape)

    return read


def _one_side(side: int) -> Any:
    return Query(side, side, False, False)


def mean(moments: Any, p: Profile, side: int) -> jax.Array | None:
    """Compute the expectation of a function at every example and position."""
    q = _one_side(side)
    if len(p.fields) != 1:
        covariance = _joint(moments, [p.fields], q)
        return _on_grid(moments, [(p, False)], covariance, q)
    k = moments.variance(p.fields[0], side)
    if p.family is not None and len(p.by) < 2 and p.times is None:
        return p.family.slope(k) if p.by else p.family.mean(k)
    return _smooth_or_not(moments, p, k, q)


def linear_fit(moments: Any, p: Profile, side: int) -> list[jax.Array | None]:
    """Give the coefficients of the fields in the best linear fit of a function of them."""
    if p.family is not None:
        return [mean(moments, p.derivative(0), side)]
    products: list[Any] = [mean(moments, replace(p, times=j), side) for j in range(len(p.fields))]
    if len(p.fields) == 1:
        k = moments.variance(p.fields[0], side)
        return [products[0] / jnp.where(k > 0, k, 1)]
    inverse = jnp.linalg.pinv(_joint(moments, [p.fields], _one_side(side)), hermitian=True)
    fitted = jnp.einsum("...ij,...j->...i", inverse, jnp.stack(products, -1), precision="highest")
    return [fitted[..., j] for j in range(len(p.fields))]


def _smooth_or_not(moments: Any, p: Profile, k: jax.Array, q: Any) -> jax.Array:
    function = p.function(_reader(moments, q, False, 1))
    kinks = _as_arrays(moments, p.kinks(_reader(moments, q, False, 0)))
    if kinks:
        return quadrature.one_with_kinks(function, k, kinks)
    degree = moments.degree
    found, rough = (quadrature.coefficients(function, k, d) for d in (degree, 4 * degree // 5))
    size = jnp.max(jnp.sum(jnp.square(found), 0)) ** 0.5
    moments.errors.append(_relative(found[0], rough[0], size))
    return found[0]


def _as_arrays(moments: Any, kinks: list[Any] | None) -> list[jax.Array] | None:
    return None if kinks is None else [jnp.asarray(k, moments.dtype) for k in kinks]


def _relative(value: jax.Array, rough: jax.Array, size: jax.Array) -> jax.Array:
    """Give an error over how large the functions are, as their expectation may be 0."""
    return jnp.max(jnp.abs(value - rough)) / jnp.where(size > 0, size, 1)


def covariances(moments: Any, u: Node, v: Node, q: Any) -> Covariances:
    """Give the variances of two fields and their covariance, exact where they are one variable."""
    k11 = moments.spread(moments.variance(u, q.left), q, False)
    k22 = moments.spread(moments.variance(v, q.right), q, True)
    k12 = moments.second(u, v, q)
    k12 = jnp.zeros_like(k11 * k22) if k12 is None else k12
    if u is v and q.left == q.right:
        k12 = jnp.where(_itself(moments, u, q), k11, k12)
    return k11, k12, k22


def _itself(moments: Any, u: Node, q: Any) -> jax.Array:
    """Tell which pairs are an example and a position with itself."""
    n = moments.sizes[q.left]
    same = jnp.eye(n, dtype=bool) if q.crossed else jnp.ones(n, bool)
    ones = (1,) * len(u.shape)
    same = same.reshape(*same.shape, *ones, *(ones if q.every else ()))
    if not q.every:
        return same
    size = int(np.prod(u.shape))
    places = jnp.eye(size, dtype=bool).reshape(*u.shape, *u.shape)
    return same & places.reshape(*(1,) * (1 + q.crossed), *places.shape)


def _two(moments: Any, p: Profile, r: Profile, k: Covariances, q: Any) -> jax.Array:
    """Compute E g(u) h(v') of functions of one field each, by quadrature."""
    g, h = p.function(_reader(moments, q, False, 1)), r.function(_reader(moments, q, True, 1))
    kinks = [side.kinks(_reader(moments, q, right, 0)) for side, right in ((p, False), (r, True))]
    if any(kinks) and None not in kinks:
        return quadrature.two_with_kinks(g, h, k, (kinks[0] or [], kinks[1] or []))
    return _by_series(moments, g, h, k)


def _by_series(moments: Any, g: Any, h: Any, k: Covariances) -> jax.Array:
    k11, k12, k22 = k
    product = jnp.sqrt(k11 * k22)
    rho = jnp.where(product > 0, k12 / jnp.where(product > 0, product, 1), 0)

    def of(degree: int) -> tuple[jax.Array, jax.Array]:
        a, b = quadrature.coefficients(g, k11, degree), quadrature.coefficients(h, k22, degree)
        size = jnp.max(jnp.sum(jnp.square(a), 0)) * jnp.max(jnp.sum(jnp.square(b), 0))
        return quadrature.series(a, b, rho), size**0.5

    value, size = of(moments.degree)
    moments.errors.append(_relative(value, of(4 * moments.degree // 5)[0], size))
    return value


def second(moments: Any, p: Profile, r: Profile, q: Any) -> jax.Array:
    """Compute E g(u(x)) h(v(x'))."""
    if len(p.fields) == len(r.fields) == 1:
        k = covariances(moments, p.fields[0], r.fields[0], q)
        one, other = _families(p, r)
        if one is not None and type(one) is type(other) and not (p.by or r.by):
            return jnp.broadcast_to(one.second(other, k), _shape(k))
        return _two(moments, p, r, k, q)
    covariance = _joint(moments, [p.fields, r.fields], q)
    return _on_grid(moments, [(p, False), (r, True)], covariance, q)


def _families(p: Profile, r: Profile) -> tuple[Any, Any]:
    return p.family, r.family


def _shape(k: Covariances) -> tuple[int, ...]:
    return jnp.broadcast_shapes(*(v.shape for v in k))


def _dual(moments: Any, p: Profile, r: Profile, q: Any) -> Callable[[Covariances], jax.Array]:
    """Give E g'(u) h'(v') as a function of the covariances."""
    one, other = _families(p, r)
    if one is not None and type(one) is type(other):
        return lambda k: jnp.broadcast_to(one.dual(other, k), _shape(k))
    return lambda k: _two(moments, p.derivative(0), r.derivative(0), k, q)


def tangent(moments: Any, p: Profile, r: Profile, q: Any) -> jax.Array | None:
    """Compute E <dg(u(x)), dh(v(x'))>."""
    total = None
    alone = len(p.fields) == len(r.fields) == 1
    for i, u in enumerate(p.fields):
        for j, v in enumerate(r.fields):
            inner = moments.fixed(u, v, q)
            shared = [
                (w, z, same_entries(one, other, q, moments.dtype))
                for one, w in scales(u)
                for other, z in scales(v)
                if np.intersect1d(one, other).size
            ]
            if inner is None and not shared:
                continue
            if not alone and shared:
                refuse("a scale that is differentiated before a function of several fields", "")
            if alone:
                k = covariances(moments, u, v, q)
                slopes = _dual(moments, p, r, q)(k)
            else:
                slopes = second(moments, p.derivative(i), r.derivative(j), q)
            parts = [] if inner is None else [slopes * inner]
            parts += [_by_scale(moments, p, r, w, z, q) * same for w, z, same in shared]
            for part in parts:
                total = part if total is None else total + part
    return total


def _chain(u: Node) -> Node:
    """Give what a field is without what is added to it that does not vary."""
    if isinstance(u, Sum):
        vary = [t for t in u.terms if not (isinstance(t, Entries) and t.variance is None)]
        return vary[0] if len(vary) == 1 else u
    return u


def _by_scale(moments: Any, p: Profile, r: Profile, w: Node, z: Node, q: Any) -> jax.Array:
    """Compute E g'(u) h'(v') w z': w and z' are the derivatives of u and v' by the same weight.

    Where u = gamma w it is E u g'(u) v' h'(v') / (gamma gamma'); otherwise, with integration by
    parts, C_wz E F + sum_ab C_wa C_zb E d_a d_b F for F = g'(u) h'(v') and a, b of u, v'.
    """
    u, v = p.fields[0], r.fields[0]
    ends: list[Any] = [_chain(u), _chain(v)]
    if all(isinstance(e, Scaled) and e.inner is d for e, d in zip(ends, (w, z), strict=True)):
        gammas = moments.spread(ends[0].value.sides[q.left], q, False)
        gammas = gammas * moments.spread(ends[1].value.sides[q.right], q, True)
        k = covariances(moments, u, v, q)
        one, other = p.family, r.family
        if isinstance(one, Piecewise) and isinstance(other, Piecewise):
            return one.second(other, k) / gammas
        g, h = (replace(side.derivative(0), times=0) for side in (p, r))
        return _two(moments, g, h, k, q) / gammas
    reads = [_reader(moments, q, right, 0) for right in (False, True)]
    kinky = isinstance(p.family, Piecewise) or isinstance(r.family, Piecewise)
    if kinky or p.kinks(reads[0]) or r.kinks(reads[1]):
        refuse(
            "a scale that is differentiated in a sum, before an activation with a kink",
            "Leave it out, or make its variance a number",
        )
    k = covariances(moments, u, v, q)
    k: Any = tuple(jnp.broadcast_to(part, _shape(k)) for part in k)
    dual = _dual(moments, p, r, q)
    dual(k)  # for its error: what is noted inside of a derivative may not leave it
    noted = len(moments.errors)
    value, pullback = jax.vjp(lambda *k: dual(k), *k)
    del moments.errors[noted:]
    d11, d12, d22 = pullback(jnp.ones_like(value))

    def cross(a: Node, b: Node, right_a: bool, right_b: bool) -> Any:
        if right_a != right_b:
            found = moments.second(a, b, q) if right_b else moments.second(b, a, q)
        else:
            side = q.right if right_a else q.left
            found = moments.second(a, b, _one_side(side))
            found = None if found is None else moments.spread(found, q, right_a)
        return 0.0 if found is None else found

    wu, wv = cross(w, u, False, False), cross(w, v, False, True)
    zu, zv = cross(z, u, True, False), cross(z, v, True, True)
    wz = cross(w, z, False, True)
    return wz * value + 2 * wu * zu * d11 + 2 * wv * zv * d22 + (wu * zv + wv * zu) * d12


def _joint(moments: Any, groups: list[tuple[Node, ...]], q: Any) -> jax.Array:
    """Give the covariance of fields at x, and at x', (..., d, d)."""
    every = [(field, bool(g)) for g, group in enumerate(groups) for field in group]
    rows = []
    for u, right_u in every:
        row = []
        for v, right_v in every:
            if right_u == right_v:
                side = q.right if right_u else q.left
                found = moments.second(u, v, _one_side(side))
                entry = None if found is None else moments.spread(found, q, right_u)
            elif right_v:
                entry = covariances(moments, u, v, q)[1]
            else:
                entry = covariances(moments, v, u, q)[1]
            row.append(jnp.zeros((), moments.dtype) if entry is None else entry)
        rows.append(row)
    n = max(entry.ndim for row in rows for entry in row)
    rows = [[e.reshape((1,) * (n - e.ndim) + e.shape) for e in row] for row in rows]
    shape = jnp.broadcast_shapes(*(e.shape for row in rows for e in row))
    return jnp.stack([jnp.stack([jnp.broadcast_to(e, shape) for e in row], -1) for row in rows], -2)


def _on_grid(
    moments: Any, functions: list[tuple[Profile, bool]], covariance: jax.Array, q: Any
) -> jax.Array:
    """Compute the expectation of a product of functions of several fields."""
    d = covariance.shape[-1]
    if d > 4:
        refuse(f"a function of {d // 2} fields", "Put products between, so that it has two at most")
    if any(p.kinks(_reader(moments, q, right, 0)) is None for p, right in functions):
        pass  # the error says what that costs
    degree = min(moments.degree, int(_GRID ** (1 / d)))
    pairs = int(np.prod(covariance.shape[:-2]))
    if pairs * degree**d > _MOST:
        refuse(
            f"a function of several fields at {pairs} pairs, by quadrature at {degree**d} nodes",
            "Pass fewer examples, or a smaller degree",
        )
    reads = [_reader(moments, q, right, 0) for _, right in functions]

    def product(*z: jax.Array) -> jax.Array:
        value, at = None, 0
        for (p, _), read in zip(functions, reads, strict=True):
            part = p.function(read)(*z[at : at + len(p.fields)])
            at += len(p.fields)
            value = part if value is None else value * part
        assert value is not None
        return value

    value, rough = (quadrature.grid(product, covariance, n) for n in (degree, 4 * degree // 5))
    square = quadrature.grid(lambda *z: jnp.square(product(*z)), covariance, degree)
    moments.errors.append(_relative(value, rough, jnp.max(square) ** 0.5))
    return value
