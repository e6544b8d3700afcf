"""How lazy was it? Movements of weights and kernels, alignments, gaps, and Chizat's kappa."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from lazyjax import checks
from lazyjax.derivatives import jvp
from lazyjax.kernels import matrix
from lazyjax.meshes import in_any_program
from lazyjax.norms import norm, scale_of
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params, PyTree, leaf_names
from lazyjax.widening import widened


def _floats(tree: PyTree) -> Any:
    """Give real floats of float32 at least: of integers, and of both parts of complex numbers."""

    def real(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if jnp.iscomplexobj(leaf):
            return jnp.stack([leaf.real, leaf.imag], axis=-1)
        return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(float)

    return widened(jax.tree.map(real, tree))


_START = "Measure from weights that are not all zero."


def _difference(tree: PyTree, other: Any) -> Any:
    return jax.tree.map(jnp.subtract, tree, other)


def _not_zero(name: str, size: jax.Array, cure: str) -> jax.Array:
    """Require a norm above 0, where it is known: it is divided by."""
    if checks.is_known(size) and size == 0:
        raise ValueError(f"`{name}` must not be zero, got zeros only. {cure}")
    return size


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
        If the trees differ, or `params0` is zero.
    """
    checks.same_tree("params", params, params0, "params0")
    params, params0 = _floats((params, params0))
    everything = _not_zero("params0", norm(params0), _START)
    return norm(_difference(params, params0)) / everything


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
        If the trees differ, or `params0` is zero.
    """
    checks.same_tree("params", params, params0, "params0")
    params, params0 = _floats((params, params0))
    everything = _not_zero("params0", norm(params0), _START)
    movements = []
    for w, w0 in zip(jax.tree.leaves(params), jax.tree.leaves(params0), strict=True):
        own = norm(w0)
        movements.append(norm(w - w0) / jnp.where(own > 0, own, everything))
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
        If the leaves have no common first axis of 2 or more, or the weights after a step are zero.
    """
    if checks.batch("params", params) < 2:
        raise ValueError(
            "`params` must hold the weights of at least 2 steps, got 1. Record more steps."
        )
    params = _floats(params)
    after = jax.vmap(norm)(jax.tree.map(lambda w: w[1:], params))
    _not_zero("params", jnp.min(after), "Leave out the steps at which all weights are zero.")
    steps = jax.tree.map(lambda w: w[1:] - w[:-1], params)
    return jax.vmap(norm)(steps) / after


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
    TypeError
        If they are operators.
    ValueError
        If the shapes differ, or `kernel0` is zero.
    """
    _no_operator("relative_kernel_change", "relative_change", kernel, kernel0)
    _same_shape("kernel", kernel, "kernel0", kernel0)
    kernel, kernel0 = _floats((kernel, kernel0))
    size = _not_zero("kernel0", norm(kernel0), "Compare with a kernel that is not zero.")
    return norm(kernel - kernel0) / size


def _centered(kernel: jax.Array) -> jax.Array:
    """Subtract the means of rows and columns, H K H with H = I - 1 1^T / M.

    The first row and column go before, which changes nothing but the rounding: what is constant
    leaves exactly zero.
    """
    rows = kernel - kernel[:1]
    rows = rows - jnp.mean(rows, axis=0, keepdims=True)
    rows = rows - rows[:, :1]
    return rows - jnp.mean(rows, axis=1, keepdims=True)


def _unit(name: str, kernel: jax.Array, centered: bool) -> jax.Array:
    """Divide a kernel by its Frobenius norm."""
    kernel = _floats(kernel)
    size = _not_zero(name, norm(kernel), "An alignment needs kernels and targets that are not.")
    kernel = kernel / size
    if not centered:
        return kernel
    kernel = _centered(kernel)
    size = norm(kernel)
    if checks.is_known(size) and size == 0:
        raise ValueError(
            f"`{name}` must not be constant over the points where it is centered, got zeros after "
            "centering. Use centered=False."
        )
    return kernel / size


def _no_operator(function: str, other: str, *kernels: Any) -> None:
    """Refuse operators, whose numbers are estimates."""
    for kernel in kernels:
        if not hasattr(kernel, "ndim"):
            raise TypeError(
                f"`{function}` must be given arrays, got {type(kernel).__name__}. Of operators use "
                f"lazyjax.operators.{other}(key, A, B), which estimates it by products."
            )


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
    TypeError
        If they are operators.
    ValueError
        If the shapes differ, or a kernel is zero, for `centered` after centering.

    References
    ----------
    Cristianini, Shawe-Taylor, Elisseeff, Kandola 2001, "On kernel-target alignment"; centred:
    Cortes, Mohri, Rostamizadeh 2012, "Algorithms for learning kernels based on centered alignment".
    """
    _no_operator("kernel_alignment", "alignment", a, b)
    _same_shape("a", a, "b", b)
    return jnp.sum(_unit("a", matrix(a), centered) * _unit("b", matrix(b), centered))


def target_alignment(kernel: jax.Array, y: jax.Array, *, centered: bool = False) -> jax.Array:
    """Compute the alignment of a kernel with the targets, that is with y y^T.

    Parameters
    ----------
    kernel : (N, N) or (N, N, *out, *out)
        Real, or complex and Hermitian.
    y : (N, *out)
        An (N, N) kernel is held against sum_k y_k y_k^T; of complex targets y_k^T is conjugated.
    centered : bool
        Centre both in feature space first.

    Returns
    -------
    () array

    Raises
    ------
    ValueError
        If the shapes do not fit, or the kernel or y y^T is zero, for `centered` after centering.

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
    columns = columns if jnp.iscomplexobj(columns) else _floats(columns)
    columns = columns / scale_of(columns)
    with jax.default_matmul_precision("highest"):
        target = columns @ columns.conj().T
    if jnp.iscomplexobj(square) or jnp.iscomplexobj(target):
        square, target = square + 0j, target + 0j
    return jnp.sum(_unit("kernel", square, centered) * _unit("y", target, centered))


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
    prediction, prediction_tangent = _floats((prediction, prediction_tangent))
    difference = prediction - prediction_tangent
    return norm(difference) / difference.size**0.5


def pattern_change(
    preactivations: Callable[[Params, Any], Any], params: Params, params0: Params, x: PyTree
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
