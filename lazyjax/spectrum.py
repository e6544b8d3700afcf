"""The spectrum of a kernel: eigenvalues, ranks, the critical learning rate, random-matrix laws."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lazyjax import checks
from lazyjax.convolutions import plain_convolutions
from lazyjax.derivatives import linearization
from lazyjax.laws import check_momentum
from lazyjax.meshes import in_any_program
from lazyjax.norms import norm, scale_of
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params, PyTree
from lazyjax.widening import widened


def _square(kernel: jax.Array) -> jax.Array:
    """View a kernel (N, N) or (N, N, *out, *out) as a matrix (N K, N K)."""
    axes = kernel.ndim - 2
    half = axes // 2
    out = kernel.shape[2 : 2 + half]
    if (
        kernel.ndim < 2
        or axes % 2
        or kernel.shape[0] != kernel.shape[1]
        or kernel.shape[2 + half :] != out
    ):
        raise ValueError(
            "`kernel` must have shape (N, N) or (N, N, *out, *out), got "
            f"{kernel.shape}. Use ntk(f, params, x) with one batch."
        )
    size = kernel.shape[0] * int(np.prod(out))
    order = (0, *range(2, 2 + half), 1, *range(2 + half, kernel.ndim))
    return jnp.transpose(kernel, order).reshape(size, size)


def eigenvalues(kernel: jax.Array) -> jax.Array:
    """Compute the eigenvalues of a kernel, in ascending order.

    Parameters
    ----------
    kernel : (N, N) or (N, N, *out, *out)

    Returns
    -------
    (N K,) array
        Of the symmetric part, which is what `eigvalsh` sees; in float32 at least.

    Raises
    ------
    ValueError
        If the kernel is not square.

    Notes
    -----
    O((N K)^3) time.
    """
    return _eigenvalues(kernel)


@jax.jit
def _eigenvalues(kernel: jax.Array) -> jax.Array:
    square = _square(widened(kernel))
    scale = scale_of(square)
    return scale * jnp.linalg.eigvalsh(square / scale)


def numerical_rank(kernel: jax.Array) -> jax.Array:
    """Count the eigenvalues that rounding cannot explain, those above N K eps lambda_max.

    eps is that of the kernel's dtype.

    Parameters
    ----------
    kernel : (N, N) or (N, N, *out, *out)

    Returns
    -------
    () array of int

    Raises
    ------
    ValueError
        If the kernel is not square.
    """
    return _numerical_rank(kernel)


@jax.jit
def _numerical_rank(kernel: jax.Array) -> jax.Array:
    values = jnp.abs(eigenvalues(kernel))
    rounding = values.size * float(jnp.finfo(jnp.result_type(kernel)).eps)
    return jnp.sum(values > rounding * jnp.max(values))


def effective_rank(kernel: jax.Array) -> jax.Array:
    """Compute the exponential of the entropy of the normalised spectrum.

    erank = exp(-sum_i p_i log p_i),  p_i = lambda_i / sum_j lambda_j

    Parameters
    ----------
    kernel : (N, N) or (N, N, *out, *out)

    Returns
    -------
    () array
        Between 1 and N K.

    Raises
    ------
    ValueError
        If the kernel is not square, or has no positive eigenvalue.

    References
    ----------
    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = eigenvalues(kernel)
    if checks.is_known(values) and not np.any(np.asarray(values) > 0):
        raise ValueError(
            "`kernel` must have a positive eigenvalue, got none. Use the kernel of parameters that "
            "the model depends on."
        )
    return _effective_rank(values)


@jax.jit
def _effective_rank(values: jax.Array) -> jax.Array:
    values = jnp.maximum(values, 0.0)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(values / jnp.sum(values))))


def critical_learning_rate(
    kernel: jax.Array,
    *,
    outputs: int | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    ridge: float = 0.0,
) -> jax.Array:
    """Compute the largest stable learning rate of the tangent model.

    eta_c = c N K / (lambda_max + ridge), with c = 1 + momentum for gradient descent and the heavy
    ball, and c = (1 + momentum) / (1 + 2 momentum) for Nesterov's momentum.

    Parameters
    ----------
    kernel : (N, N) or (N, N, *out, *out)
    outputs : int, optional
        K, for an (N, N) kernel that is the same for every output.
    momentum : float
        In [0, 1), as in `optax.sgd`.
    nesterov : bool
    ridge : float
        As in `lazyjax.dynamics`, 0 or more.

    Returns
    -------
    () array
        For gradient descent on the mean squared error over all N K elements, without 1/2. Infinity
        for a kernel of zeros without a ridge.

    Raises
    ------
    TypeError, ValueError
        If the kernel is not square, `outputs` is missing for an (N, N) kernel or contradicts the
        kernel, momentum is outside [0, 1), or the ridge is negative.

    References
    ----------
    Polyak 1964; Sutskever, Martens, Dahl, Hinton 2013 (the stability limits of the quadratic).

    Examples
    --------
    >>> critical_learning_rate(jnp.eye(4), outputs=1).item()
    4.0
    """
    check_momentum(momentum)
    checks.not_negative("ridge", ridge)
    square = _square(kernel)
    held = square.shape[0] // kernel.shape[0]
    if kernel.ndim == 2:
        if outputs is None:
            raise ValueError(
                "`outputs` must be given for a kernel of shape (N, N), got None. Use outputs=1 for "
                "a model with one output."
            )
        checks.whole("outputs", outputs, least=1)
        held = outputs
    elif outputs is not None and outputs != held:
        raise ValueError(
            f"`outputs` must be {held}, as the kernel has it, got {outputs}. Leave it out."
        )
    c = (1 + momentum) / (1 + 2 * momentum) if nesterov else 1 + momentum
    largest = jnp.maximum(eigenvalues(kernel)[-1], 0)
    return c * kernel.shape[0] * held / jnp.abs(largest + ridge)  # 1 / -0 is not infinity


@partial(jax.jit, static_argnames=("iterations",))
def _power_iteration(
    f: ModelFunction, params: Params, x: PyTree, key: jax.Array, tolerance: float, iterations: int
) -> jax.Array:
    value, product = linearization(lambda w: f(w, x), params)
    transpose = jax.linear_transpose(product, params)

    def unit(v: Any) -> tuple[Any, jax.Array]:
        length, v = norm(v), widened(v)
        over = jnp.where(length > 0, length, 1)
        return jax.tree.map(lambda a: (a / over).astype(a.dtype), v), length

    def like(v: Any, other: Any) -> Any:
        return jax.tree.map(lambda a, b: a.astype(jnp.result_type(b)), v, other)

    # vectors are float32 at least, and what the model's own dtype sees is of unit length
    @plain_convolutions  # which are ten times faster inside a loop
    def kernel_product(v: Any) -> tuple[Any, jax.Array]:
        u, length = unit(transpose(like(v, value))[0])
        v, other = unit(product(like(u, params)))
        return v, length * other

    def going_on(state: PyTree) -> jax.Array:
        _, largest, before, i = state
        return (i < iterations) & (jnp.abs(largest - before) > tolerance * largest)

    def step(state: PyTree) -> Any:
        v, largest, _, i = state
        v, now = kernel_product(v)
        return v, now.astype(zero.dtype), largest, i + 1

    start, _ = unit(optax.tree.random_like(key, widened(value)))
    zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(start)))
    state = (start, zero + 1, zero - 1, 0)
    return jax.lax.while_loop(going_on, step, state)[1]


@in_any_program()
def largest_eigenvalue(
    f: ModelFunction,
    params: Params,
    x: PyTree,
    *,
    key: jax.Array | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> jax.Array:
    """Compute the largest eigenvalue of the empirical NTK without forming it.

    Power iteration on J J^T: a vjp and a jvp a step.

    Parameters
    ----------
    f : ModelFunction
    params : pytree of floats
    x : array (N, ...) or pytree
    key : key, optional
        Of the start; by default that of seed 0.
    iterations : int
        At most so many.
    tolerance : float
        Stop when the value changes by less than that, relatively.

    Returns
    -------
    () array
        A lower bound, up to rounding; in float32 at least.

    Raises
    ------
    TypeError, ValueError
        If `params` holds anything but floats, or `iterations` or `tolerance` is not positive.

    Notes
    -----
    The memory of one backward pass on the whole batch.
    """
    checks.floating("params", params)
    checks.whole("iterations", iterations, least=1)
    checks.positive("tolerance", tolerance)
    key = jax.random.key(0) if key is None else key
    f = as_it_is(checks.model_function(f), params, one_example(x))
    return _power_iteration(f, params, x, key, tolerance, iterations)


class WishartEdge(NamedTuple):
    """Where the largest eigenvalue of X X^T lies, X of independent N(0, 1/n), p x n."""

    edge: float  # of the Marchenko-Pastur law, (1 + sqrt(p/n))^2
    scale: float  # of the fluctuations about it
    mean: float  # the edge less 1.2065 scales, the mean of the Tracy-Widom law of real matrices


TRACY_WIDOM_MEAN = -1.2065335745820


def wishart_edge(p: int, n: int) -> WishartEdge:
    """Give the law of the largest eigenvalue of X X^T, X (p, n) of independent N(0, 1/n).

    lambda_max ~ edge + scale TW_1,
    edge = (1 + sqrt(p/n))^2,
    scale = (sqrt(n) + sqrt(p)) (1/sqrt(n) + 1/sqrt(p))^(1/3) / n

    Parameters
    ----------
    p, n : int
        Both large.

    Returns
    -------
    WishartEdge

    Raises
    ------
    TypeError, ValueError
        If `p` or `n` is no whole number from 1.

    References
    ----------
    Marchenko and Pastur 1967; Johnstone 2001, "On the distribution of the largest eigenvalue in
    principal components analysis", theorem 1.1.

    Examples
    --------
    >>> f"{wishart_edge(100, 5000).edge:.4f}"
    '1.3028'
    """
    checks.whole("p", p, least=1)
    checks.whole("n", n, least=1)
    edge = (1 + (p / n) ** 0.5) ** 2
    scale = (n**0.5 + p**0.5) * (n**-0.5 + p**-0.5) ** (1 / 3) / n
    return WishartEdge(edge, scale, edge + TRACY_WIDOM_MEAN * scale)
