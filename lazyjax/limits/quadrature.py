"""Expectations over Gaussian variables by quadrature, one variable for each example or a few.

For two variables z, z' of correlation rho, E g(z) h(z') = sum_n a_n b_n rho^n (Mehler 1866), where
a_n and b_n are the coefficients of g and h in normalised Hermite polynomials, by Gauss-Hermite
quadrature: what would be a grid of two dimensions is two of one. Where g has kinks the series is
slow, and the grid is cut there.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Function = Callable[[jax.Array], jax.Array]
"""Of values on a new first axis, and of the examples and positions on the others."""

_FAR = 9.5  # standard deviations, beyond which a Gaussian is less than rounding
_EDGES = (-6.0, -3.5, -1.5, 0.0, 1.5, 3.5, 6.0)  # of panels where no kink is near
_GRADES = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.4, 1.2, 2.5, 4.5, 2 * _FAR)


@lru_cache(maxsize=8)
def _hermite(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the nodes, and w_i he_n(x_i) / sqrt(n!) for each order n < degree."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(degree)
    weights = weights / weights.sum()
    # functions of unit norm, each order from the two before, times the root of the weight
    rows = [np.sqrt(weights), nodes * np.sqrt(weights)]
    for n in range(1, degree - 1):
        rows.append((nodes * rows[n] - n**0.5 * rows[n - 1]) / (n + 1) ** 0.5)
    return nodes, np.stack(rows[:degree]) * np.sqrt(weights)


def _column(values: np.ndarray, like: jax.Array) -> jax.Array:
    return jnp.asarray(values, like.dtype).reshape(-1, *(1,) * like.ndim)


def coefficients(function: Function, variance: jax.Array, degree: int) -> jax.Array:
    """Give the Hermite coefficients (degree, *variance.shape) of g(sqrt(variance) x)."""
    nodes, basis = _hermite(degree)
    values = function(jnp.sqrt(variance)[None] * _column(nodes, variance))
    values = jnp.broadcast_to(values, (degree, *jnp.broadcast_shapes(values.shape[1:])))
    return jnp.tensordot(jnp.asarray(basis, variance.dtype), values, 1, precision="highest")


def correlation(k11: jax.Array, k12: jax.Array, k22: jax.Array) -> jax.Array:
    """Give k12 / sqrt(k11 k22), between -1 and 1; 0 where a variance is."""
    product = jnp.sqrt(k11 * k22)
    return jnp.clip(jnp.where(product > 0, k12 / jnp.where(product > 0, product, 1), 0), -1, 1)


def series(a: jax.Array, b: jax.Array, rho: jax.Array) -> jax.Array:
    """Sum a_n b_n rho^n, by Horner's rule."""
    shape = jnp.broadcast_shapes(a.shape[1:], b.shape[1:], rho.shape)

    def step(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total * rho + pair[0] * pair[1], None

    total, _ = jax.lax.scan(step, jnp.zeros(shape, rho.dtype), (a, b), reverse=True)
    return total


@lru_cache(maxsize=2)
def _legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def _panels(edges: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Give nodes and weights, on the first axis, between edges that are in order there."""
    nodes, weights = _legendre(count)
    start, length = edges[:-1], jnp.diff(edges, axis=0)
    at = start[:, None] + length[:, None] * _column(nodes, edges[0])[None]
    each = length[:, None] * _column(weights, edges[0])[None]
    return at.reshape(-1, *edges.shape[1:]), each.reshape(-1, *edges.shape[1:])


def _density(z: jax.Array) -> jax.Array:
    return jnp.exp(-jnp.square(z) / 2) / np.sqrt(2 * np.pi)


def _edges(kinks: list[jax.Array], shape: tuple[int, ...], dtype: Any, graded: bool) -> jax.Array:
    """Give the edges of panels: fixed ones, and at the kinks, and closer the nearer to one."""
    fixed = (-_FAR, *(_EDGES if graded else (0.0,)), _FAR)
    ends = [jnp.full(shape, edge, dtype) for edge in fixed]
    if graded:
        near = [
            jnp.broadcast_to(kink, shape) + sign * grade
            for kink in kinks
            for grade in _GRADES
            for sign in (-1, 1)
        ]
    else:
        near = [jnp.broadcast_to(kink, shape) for kink in kinks]
    return jnp.sort(jnp.clip(jnp.stack([*ends, *near]), -_FAR, _FAR), axis=0)


def one_with_kinks(function: Function, variance: jax.Array, kinks: list[jax.Array]) -> jax.Array:
    """Compute E g(z) of a function that is smooth between kinks, values of z."""
    scale = jnp.sqrt(variance)
    safe = jnp.where(scale > 0, scale, 1)
    edges = _edges([k / safe for k in kinks], variance.shape, variance.dtype, graded=True)
    nodes, weights = _panels(edges, 16)
    return jnp.sum(weights * _density(nodes) * function(scale[None] * nodes), 0)


def two_with_kinks(
    g: Function,
    h: Function,
    k: tuple[jax.Array, jax.Array, jax.Array],
    kinks: tuple[list[jax.Array], list[jax.Array]],
) -> jax.Array:
    """Compute E g(z) h(z') of functions that are smooth between kinks.

    z' = sqrt(k22) (rho x + sqrt(1 - rho^2) y) given z = sqrt(k11) x: over y between the kinks of
    h, over x between those of g and of what is left of those of h.
    """
    k11, k12, k22 = k
    shape = jnp.broadcast_shapes(k11.shape, k12.shape, k22.shape)
    rho = jnp.broadcast_to(correlation(k11, k12, k22), shape)
    rest = jnp.sqrt(jnp.maximum((1 - rho) * (1 + rho), 0))
    one, two = (jnp.broadcast_to(jnp.sqrt(v), shape) for v in (k11, k22))
    safe_one, safe_two = (jnp.where(s > 0, s, 1) for s in (one, two))
    mine = [jnp.broadcast_to(c / safe_one, shape) for c in kinks[0]]
    theirs = [jnp.broadcast_to(c / safe_two, shape) for c in kinks[1]]
    steep = jnp.where(jnp.abs(rho) > 0.05, rho, 1)
    outer = _edges([*mine, *(c / steep for c in theirs)], shape, rho.dtype, graded=True)
    nodes, weights = _panels(outer, 10)

    def at(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, weight = pair
        safe = jnp.where(rest > 0, rest, 1)
        cuts = [jnp.where(rest > 0, (c - rho * x) / safe, 0) for c in theirs]
        y, inner = _panels(_edges(cuts, shape, rho.dtype, graded=False), 24)
        values = h(two[None] * ((rho * x)[None] + rest[None] * y))
        inside = jnp.sum(inner * _density(y) * values, 0)
        return total + weight * _density(x) * g((one * x)[None])[0] * inside, None

    return jax.lax.scan(at, jnp.zeros(shape, rho.dtype), (nodes, weights))[0]


def grid(function: Callable[..., jax.Array], covariance: jax.Array, degree: int) -> jax.Array:
    """Compute E g(z_1, ..., z_d) on a grid of degree^d nodes.

    Parameters
    ----------
    function : callable
        Of d arrays (...).
    covariance : (..., d, d)
    degree : int

    Returns
    -------
    (...)
    """
    d = covariance.shape[-1]
    nodes, basis = _hermite(degree)
    points = np.stack(np.meshgrid(*[nodes] * d, indexing="ij"), -1).reshape(-1, d)
    weights = np.prod(np.stack(np.meshgrid(*[basis[0]] * d, indexing="ij"), -1), -1).reshape(-1)
    root = _root(covariance)

    def at(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        point, weight = pair
        z = jnp.einsum("...ij,j->...i", root, point, precision="highest")
        return total + weight * function(*(z[..., i] for i in range(d))), None

    dtype = covariance.dtype
    each = (jnp.asarray(points, dtype), jnp.asarray(weights, dtype))
    return jax.lax.scan(at, jnp.zeros(covariance.shape[:-2], dtype), each)[0]


def _root(covariance: jax.Array) -> jax.Array:
    """Give L with L L^T the covariance, which may be singular: what rounding explains is 0."""
    d = covariance.shape[-1]
    rows: list[list[jax.Array]] = []
    eps = d * jnp.finfo(covariance.dtype).eps
    zero = jnp.zeros(covariance.shape[:-2], covariance.dtype)
    for i in range(d):
        row: list[jax.Array] = []
        for j in range(i):
            rest = covariance[..., i, j] - sum((row[m] * rows[j][m] for m in range(j)), zero)
            pivot = rows[j][j]
            row.append(jnp.where(pivot > 0, rest / jnp.where(pivot > 0, pivot, 1), 0))
        square = covariance[..., i, i] - sum((entry * entry for entry in row), zero)
        row.append(jnp.sqrt(jnp.where(square > eps * covariance[..., i, i], square, 0)))
        rows.append(row)
    full = [[*row, *[zero] * (d - len(row))] for row in rows]
    return jnp.stack([jnp.stack(row, -1) for row in full], -2)
