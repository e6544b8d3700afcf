"""How lazy was it? Movements of weights and kernels, alignments, gaps, and Chizat's kappa."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from lazyjax import checks
from lazyjax.derivatives import jvp
from lazyjax.kernels import matrix
from lazyjax.types import ModelFunction, Params, leaf_names


def relative_weight_movement(params: Params, params0: Params) -> jax.Array:
    """Compute norm(w - w0) / norm(w0) over all parameters.

    Parameters
    ----------
    params, params0 : pytrees
        Of one structure.

    Returns
    -------
    () array

    Raises
    ------
    ValueError
        If the trees differ.
    """
    checks.same_tree("params", params, params0, "params0")
    return optax.tree.norm(optax.tree.sub(params, params0)) / optax.tree.norm(params0)


def layer_movement(params: Params, params0: Params) -> dict[str, jax.Array]:
    """Compute the relative movement of each leaf.

    Parameters
    ----------
    params, params0 : pytrees
        Of one structure.

    Returns
    -------
    dict of () arrays
        By the path of the leaf, as in `hidden_0/kernel`. A leaf whose norm at w0 is 0 is divided by
        the norm of all of w0.

    Raises
    ------
    ValueError
        If the trees differ.
    """
    checks.same_tree("params", params, params0, "params0")
    everything = optax.tree.norm(params0)
    movements = []
    for w, w0 in zip(jax.tree.leaves(params), jax.tree.leaves(params0), strict=True):
        own = jnp.linalg.norm(jnp.ravel(w0))
        movements.append(jnp.linalg.norm(jnp.ravel(w - w0)) / jnp.where(own > 0, own, everything))
    return dict(zip(leaf_names(params0), movements, strict=True))


def step_sizes(params: Params) -> jax.Array:
    """Compute the size of successive steps, norm(w_{i+1} - w_i) / norm(w_{i+1}).

    Parameters
    ----------
    params : pytree of (G, ...)
        The parameters of a history, one run.

    Returns
    -------
    (G - 1,) array

    Raises
    ------
    ValueError
        If the leaves have no common first axis of 2 or more.
    """
    if checks.batch("params", params) < 2:
        raise ValueError(
            "`params` must hold the weights of at least 2 steps, got 1. Record more steps."
        )
    after = jax.tree.map(lambda w: w[1:], params)
    steps = jax.tree.map(lambda w: w[1:] - w[:-1], params)
    return jax.vmap(optax.tree.norm)(steps) / jax.vmap(optax.tree.norm)(after)


def _same_shape(name: str, array: Any, other_name: str, other: Any) -> None:
    if jnp.shape(array) != jnp.shape(other):
        raise ValueError(
            f"`{name}` must have the shape of `{other_name}`, {jnp.shape(other)}, got "
            f"{jnp.shape(array)}. Compute both on the same points."
        )


def relative_kernel_change(kernel: jax.Array, kernel0: jax.Array) -> jax.Array:
    """Compute norm(K - K0)_F / norm(K0)_F.

    Parameters
    ----------
    kernel, kernel0 : arrays of one shape

    Returns
    -------
    () array

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    _same_shape("kernel", kernel, "kernel0", kernel0)
    return jnp.linalg.norm(jnp.ravel(kernel - kernel0)) / jnp.linalg.norm(jnp.ravel(kernel0))


def _centered(kernel: jax.Array) -> jax.Array:
    """Subtract the means of rows and columns, H K H with H = I - 1 1^T / M."""
    rows = kernel - jnp.mean(kernel, axis=0, keepdims=True)
    return rows - jnp.mean(rows, axis=1, keepdims=True)


def kernel_alignment(a: jax.Array, b: jax.Array, *, centered: bool = False) -> jax.Array:
    """Compute the cosine of two kernels, <A, B>_F / (norm(A)_F norm(B)_F).

    Parameters
    ----------
    a, b : (N, N) or (N, N, *out, *out)
    centered : bool
        Centre both in feature space first.

    Returns
    -------
    () array
        From -1 to 1; from 0 for positive semi-definite kernels.

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    Cristianini, Shawe-Taylor, Elisseeff, Kandola 2001, "On kernel-target alignment"; centred:
    Cortes, Mohri, Rostamizadeh 2012, "Algorithms for learning kernels based on centered alignment".
    """
    _same_shape("a", a, "b", b)
    a, b = matrix(a), matrix(b)
    if centered:
        a, b = _centered(a), _centered(b)
    return jnp.sum(a * b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def target_alignment(kernel: jax.Array, y: jax.Array, *, centered: bool = False) -> jax.Array:
    """Compute the alignment of a kernel with the targets, that is with y y^T.

    Parameters
    ----------
    kernel : (N, N) or (N, N, *out, *out)
    y : (N, *out)
        An (N, N) kernel is held against sum_k y_k y_k^T.
    centered : bool
        Centre both in feature space first.

    Returns
    -------
    () array

    Raises
    ------
    ValueError
        If the shapes do not fit.

    References
    ----------
    Cristianini et al. 2001.
    """
    square = matrix(kernel)
    columns = y.reshape(y.shape[0], -1) if kernel.ndim == 2 else y.reshape(-1, 1)
    if square.shape != (columns.shape[0],) * 2:
        raise ValueError(
            f"`y` must be the targets of the points of `kernel`, {kernel.shape}, got {y.shape}. "
            "Compute both on the same points."
        )
    with jax.default_matmul_precision("highest"):
        target = columns @ columns.T
    return kernel_alignment(square, target, centered=centered)


def tangent_gap(prediction: jax.Array, prediction_tangent: jax.Array) -> jax.Array:
    """Compute the rms difference of the outputs of a network and of its tangent model.

    Parameters
    ----------
    prediction, prediction_tangent : (N, *out)
        On the training points, or on a grid. Use `jax.vmap` for many times.

    Returns
    -------
    () array
        In the units of y.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    _same_shape("prediction", prediction, "prediction_tangent", prediction_tangent)
    return jnp.sqrt(jnp.mean(jnp.square(prediction - prediction_tangent)))


def pattern_change(
    preactivations: Callable[[Params, Any], Any], params: Params, params0: Params, x: Any
) -> jax.Array:
    """Compute the share of ReLU units whose sign differs between two sets of weights.

    Parameters
    ----------
    preactivations : callable
        `(params, x)` -> pytree of (N, width); see `lazyjax.models.preactivations`.
    params, params0 : pytrees
    x : array (N, ...) or pytree

    Returns
    -------
    () array
        Over all units and examples, from 0 to 1.

    Raises
    ------
    ValueError
        If the trees differ.
    """
    checks.same_tree("params", params, params0, "params0")
    now, then = preactivations(params, x), preactivations(params0, x)
    changed = jax.tree.map(lambda a, b: jnp.ravel((a > 0) != (b > 0)), now, then)
    return jnp.mean(jnp.concatenate(jax.tree.leaves(changed)))


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
    x: Any,
    y: Any,
    key: jax.Array,
    restarts: int,
    iterations: int,
) -> Kappa:
    flat0, unravel = ravel_pytree(params0)

    def outputs(w: jax.Array) -> jax.Array:
        return ravel_pytree(f(unravel(w), x))[0]

    def directional(w: jax.Array, u: jax.Array) -> jax.Array:  # J(w) u
        return jvp(outputs, w, u)[1]

    h0 = outputs(flat0)
    jacobian = jax.vmap(jax.vjp(outputs, flat0)[1])(jnp.eye(h0.size, dtype=h0.dtype))[0]
    first = jnp.sqrt(jnp.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    residual = jnp.linalg.norm(h0 - ravel_pytree(y)[0])

    def second(u: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array]]]:
        """Give u -> D2h(u, .) as the pullback of w -> J(w) u."""
        return jax.vjp(lambda w: directional(w, u), flat0)

    def unit(v: jax.Array) -> jax.Array:
        norm = jnp.linalg.norm(v)
        return v / jnp.where(norm > 0, norm, 1)

    def climb(key: jax.Array) -> jax.Array:
        """Alternate over z, u, v in max <z, D2h(u, v)>: each step raises it."""

        def step(state: Any, _: Any) -> Any:
            u, v = state
            z = unit(jvp(lambda w: directional(w, u), flat0, v)[1])
            v = unit(second(u)[1](z)[0])
            u = unit(second(v)[1](z)[0])
            return (u, v), None

        start = tuple(
            unit(jax.random.normal(k, flat0.shape, flat0.dtype)) for k in jax.random.split(key)
        )
        (u, v), _ = jax.lax.scan(step, start, length=iterations)
        return jnp.linalg.norm(jvp(lambda w: directional(w, u), flat0, v)[1])

    second_lower = jnp.max(jax.lax.map(climb, jax.random.split(key, restarts)))

    def gram(p: jax.Array) -> jax.Array:
        """Compute B B^T with B = D2h(e_p, .), (N K, P)."""
        basis = jax.nn.one_hot(p, flat0.size, dtype=flat0.dtype)
        _, pullback = second(basis)
        b = jax.vmap(lambda z: pullback(z)[0])(jnp.eye(h0.size, dtype=h0.dtype))
        return b @ b.T

    def add(total: jax.Array, p: jax.Array) -> tuple[jax.Array, None]:
        return total + gram(p), None

    zero = jnp.zeros((h0.size, h0.size), h0.dtype)
    total, _ = jax.lax.scan(add, zero, jnp.arange(flat0.size))
    second_upper = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(total)[-1], 0.0))
    scale = residual / jnp.square(first)
    return Kappa(
        scale * second_lower, scale * second_upper, residual, first, second_lower, second_upper
    )


def kappa(
    f: ModelFunction,
    params0: Params,
    x: Any,
    y: Any,
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

    References
    ----------
    Chizat, Oyallon, Bach 2019, "On lazy training in differentiable programming", equation 4.
    """
    checks.floating("params0", params0)
    checks.targets(f, params0, x, y)
    checks.whole("restarts", restarts, least=1)
    checks.whole("iterations", iterations, least=1)
    with jax.default_matmul_precision("highest"):  # the model's own products included
        return _kappa(checks.model_function(f), params0, x, y, key, restarts, iterations)
