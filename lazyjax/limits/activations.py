"""The expectations of functions of Gaussian fields: closed forms first, then quadrature."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.limits import quadrature
from lazyjax.limits.closed import Covariances, Piecewise
from lazyjax.limits.nodes import Entries, Known, Node, Query, Scaled, Sum, same_entries, scales
from lazyjax.limits.profiles import Profile, Read
from lazyjax.limits.refusals import refuse

_GRID = 2**16  # nodes of a grid over several fields
_MOST = 2**36  # values of a function on all of them


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
        one, other = cast(Any, (p.family, r.family))
        if one is not None and type(one) is type(other) and not (p.by or r.by):
            return jnp.broadcast_to(one.second(other, k), _shape(k))
        return _two(moments, p, r, k, q)
    covariance = _joint(moments, [p.fields, r.fields], q)
    return _on_grid(moments, [(p, False), (r, True)], covariance, q)


def _shape(k: Covariances) -> tuple[int, ...]:
    return jnp.broadcast_shapes(*(v.shape for v in k))


def _dual(moments: Any, p: Profile, r: Profile, q: Any) -> Callable[[Covariances], jax.Array]:
    """Give E g'(u) h'(v') as a function of the covariances."""
    one, other = cast(Any, (p.family, r.family))
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
        one, other = cast(Any, (p.family, r.family))
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
