"""Chizat's relative scale kappa: training is lazy where it is small."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from lazyjax import checks
from lazyjax.derivatives import jvp
from lazyjax.meshes import in_any_program
from lazyjax.norms import norm, scale_of
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params, PyTree
from lazyjax.widening import widened


class Kappa(NamedTuple):
    """Chizat's relative scale, bracketed, and what it is made of."""

    lower: jax.Array
    upper: jax.Array
    residual: jax.Array  # norm(h0 - y)
    first: jax.Array  # norm(Dh), the largest singular value of the Jacobian
    second_lower: jax.Array  # norm(D2h) as a tensor, from below
    second_upper: jax.Array  # and from above


@partial(jax.jit, static_argnames=("restarts", "iterations"))
def _kappa(
    f: ModelFunction,
    params0: Params,
    x: PyTree,
    y: PyTree,
    key: jax.Array,
    restarts: int,
    iterations: int,
) -> Kappa:
    flat0, unravel = ravel_pytree(widened(params0))
    value, target = (ravel_pytree(widened(tree))[0] for tree in (f(params0, x), y))
    residual = norm(value - target)
    # kappa is free of the units of weights and outputs: in these here both are of order 1, so that
    # derivatives keep in range
    unit_w, unit_h = scale_of(flat0), scale_of(residual)
    flat0 = flat0 / unit_w

    def outputs(w: jax.Array) -> jax.Array:
        leaves = jax.tree.map(lambda new, w0: new.astype(w0.dtype), unravel(unit_w * w), params0)
        return ravel_pytree(widened(f(leaves, x)))[0] / unit_h

    def directional(w: jax.Array, u: jax.Array) -> jax.Array:  # J(w) u
        return jvp(outputs, w, u)[1]

    h0 = outputs(flat0)
    jacobian = jax.vmap(jax.vjp(outputs, flat0)[1])(jnp.eye(h0.size, dtype=h0.dtype))[0]
    unit_j = scale_of(jacobian)
    jacobian = jacobian / unit_j
    first = unit_j * jnp.sqrt(jnp.linalg.eigvalsh(jacobian @ jacobian.T)[-1])

    def second(u: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array]]]:
        """Give u -> D2h(u, .) as the pullback of w -> J(w) u."""
        return jax.vjp(lambda w: directional(w, u), flat0)

    def unit(v: jax.Array) -> jax.Array:
        length = norm(v)
        return v / jnp.where(length > 0, length, 1)

    def climb(key: jax.Array) -> jax.Array:
        """Alternate over z, u, v in max <z, D2h(u, v)>: each step raises it."""

        def step(state: PyTree, _: Any) -> Any:
            u, v = state
            z = unit(jvp(lambda w: directional(w, u), flat0, v)[1])
            v = unit(second(u)[1](z)[0])
            u = unit(second(v)[1](z)[0])
            return (u, v), None

        start = tuple(
            unit(jax.random.normal(k, flat0.shape, flat0.dtype)) for k in jax.random.split(key)
        )
        (u, v), _ = jax.lax.scan(step, start, length=iterations)
        return norm(jvp(lambda w: directional(w, u), flat0, v)[1])

    second_lower = jnp.max(jax.lax.map(climb, jax.random.split(key, restarts)))
    unit_s = scale_of(second_lower)

    def gram(p: jax.Array) -> jax.Array:
        """Compute B B^T with B = D2h(e_p, .), (N K, P)."""
        basis = jax.nn.one_hot(p, flat0.size, dtype=flat0.dtype)
        _, pullback = second(basis)
        b = jax.vmap(lambda z: pullback(z)[0])(jnp.eye(h0.size, dtype=h0.dtype)) / unit_s
        return b @ b.T

    def add(total: jax.Array, p: jax.Array) -> tuple[jax.Array, None]:
        return total + gram(p), None

    zero = jnp.zeros((h0.size, h0.size), h0.dtype)
    total, _ = jax.lax.scan(add, zero, jnp.arange(flat0.size))
    second_upper = unit_s * jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(total)[-1], 0.0))
    scale = residual / unit_h / first

    def in_units(second: jax.Array) -> jax.Array:
        return second / unit_w * unit_h / unit_w

    return Kappa(
        scale * (second_lower / first),
        scale * (second_upper / first),
        residual,
        first / unit_w * unit_h,
        in_units(second_lower),
        in_units(second_upper),
    )


@in_any_program()
def kappa(
    f: ModelFunction,
    params0: Params,
    x: PyTree,
    y: PyTree,
    *,
    key: jax.Array,
    restarts: int = 10,
    iterations: int = 50,
) -> Kappa:
    """Bracket Chizat's relative scale: training is lazy where it is small.

    kappa = norm(h0 - y) norm(D2h) / norm(Dh)^2

    with h0 the outputs at the anchor, norm(Dh) an operator norm and norm(D2h) the norm of the
    bilinear map (u, v) -> D2h(u, v), that is the largest <z, D2h(u, v)> over unit vectors.

    Parameters
    ----------
    f : ModelFunction
    params0 : pytree of floats
        The anchor, P numbers.
    x : array (N, ...) or pytree
    y : (N, *out)
    key : key
        Of the random starts.
    restarts, iterations : int
        Alternating power iterations for the lower bound: the best of so many starts, each of so
        many rounds.

    Returns
    -------
    Kappa
        `lower` and `upper` bounds of kappa, and the norms that they are made of.

    Raises
    ------
    TypeError, ValueError
        If the parameters hold anything but floats, y does not fit, or `restarts` or `iterations`
        is no whole number from 1.

    Notes
    -----
    The tensor norm is hard to compute. From below it is what a local search finds; from above it is
    the largest singular value of the flattening N K x P^2, exact, from P products of N K x P
    matrices: O(P) backward passes for all outputs, memory N K P.

    The bounds hold at any size of weights and outputs; the norms, in their units, may leave the
    range of the dtype. Sums are taken in float32 at least.

    References
    ----------
    Chizat, Oyallon, Bach 2019, "On lazy training in differentiable programming", equation 4.
    """
    checks.floating("params0", params0)
    checks.targets(f, params0, x, y)
    checks.whole("restarts", restarts, least=1)
    checks.whole("iterations", iterations, least=1)
    with jax.default_matmul_precision("highest"):  # the model's own products included
        f = as_it_is(checks.model_function(f), params0, one_example(x))
        return _kappa(f, params0, x, y, key, restarts, iterations)
