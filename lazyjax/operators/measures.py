"""Numbers of kernels that are known by their products: norm, alignment, change, effective rank.

What `lazyjax.metrics` and `lazyjax.spectrum` compute of arrays, from random vectors of signs v: the
mean of v^T M v over them is an unbiased estimate of tr M.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lazyjax import checks
from lazyjax.norms import scale_of
from lazyjax.operators.algebra import KernelOperator, require_operator
from lazyjax.operators.spectra import spectral_density
from lazyjax.operators.trace_estimates import random_signs


class Estimate(NamedTuple):
    """A number from random vectors.

    Attributes
    ----------
    value : ()
    error : ()
        Standard error over the probes.
    """

    value: jax.Array
    error: jax.Array


def _jackknife(statistic: Callable[[jax.Array], jax.Array], samples: jax.Array) -> Estimate:
    """Estimate a function of means (q,) from samples (m, q), and its error from those left out.

    error^2 = (m - 1)/m sum_i (s_i - mean_j s_j)^2, with s_i the value without sample i (Efron and
    Stein 1981, equation 1.4).
    """
    m = samples.shape[0]
    without = (jnp.sum(samples, axis=0, keepdims=True) - samples) / (m - 1)
    values = jax.vmap(statistic)(without)
    spread = values - jnp.mean(values)
    scale = scale_of(spread)  # squares need not be in range
    error = scale * jnp.sqrt((m - 1) / m * jnp.sum((spread / scale) ** 2))
    return Estimate(statistic(jnp.mean(samples, axis=0)), error)


def _not_zero(name: str, value: jax.Array) -> jax.Array:
    if checks.is_known(value) and not value > 0:
        raise ValueError(
            f"`{name}` must not be zero, got products that are zeros only. "
            "Use the kernel of parameters that the model depends on."
        )
    return value


def _products(key: jax.Array, A: KernelOperator, B: KernelOperator, probes: int) -> jax.Array:
    """Multiply the same signs by A and by B, (2, n, probes)."""
    if require_operator("A", A).shape != require_operator("B", B).shape:
        raise ValueError(
            f"`B` must have the shape of `A`, {A.shape}, got {B.shape}. "
            "Use operators of the same examples and outputs."
        )
    v = random_signs(key, A, probes).T
    # one array, so that what is equal is summed alike
    return jnp.stack([A @ v, B @ v])


def _squares(u: jax.Array) -> jax.Array:
    """Sum the squares of each column, (..., n, probes) -> (probes, ...)."""
    return jnp.moveaxis(jnp.sum(u * u, axis=-2), -1, 0)


def frobenius_norm(key: jax.Array, A: KernelOperator, *, probes: int = 32) -> Estimate:
    """Estimate the Frobenius norm of A, from norms of A v.

    norm(A)_F^2 = E norm(A v)^2

    Parameters
    ----------
    key : key
    A : KernelOperator
        Any, (n, m).
    probes : int
        Random vectors of signs, 2 or more.

    Returns
    -------
    Estimate
        The root of the mean over the probes, and its jackknife error.

    Raises
    ------
    TypeError
        If A is no operator, or the probes are no whole number.
    ValueError
        If there are fewer than 2 probes.

    Notes
    -----
    One product with a block (m, probes). The square is unbiased; the root of it is too small, by
    about error^2 / (2 value), which is below the error by a factor of twice the relative error.
    Where A^T A is diagonal it is exact. Runs under `jit`.

    References
    ----------
    Hutchinson 1990; Efron and Stein 1981, "The jackknife estimate of variance".

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([3.0, 4.0])))
    >>> float(frobenius_norm(jax.random.key(0), A).value)
    5.0
    """
    return _norm(require_operator("A", A) @ random_signs(key, A, probes).T)


@jax.jit
def _norm(u: jax.Array) -> Estimate:
    """Estimate the norm of a kernel from its products (n, probes)."""
    scale = scale_of(u)
    found = _jackknife(lambda mean: jnp.sqrt(mean[0]), _squares(u / scale)[:, None])
    return Estimate(scale * found.value, scale * found.error)


def alignment(
    key: jax.Array, A: KernelOperator, B: KernelOperator, *, probes: int = 32
) -> Estimate:
    """Estimate the cosine of two kernels, as `kernel_alignment` computes it of arrays.

    <A, B>_F / (norm(A)_F norm(B)_F),  <A, B>_F = E <A v, B v>

    Parameters
    ----------
    key : key
    A, B : KernelOperator
        Of one shape, (n, m).
    probes : int
        Random vectors of signs, 2 or more; the same for all three numbers.

    Returns
    -------
    Estimate
        From -1 to 1, to rounding, and its jackknife error. An operator and itself have exactly 1
        and an error of 0.

    Raises
    ------
    TypeError
        If A or B is no operator, or the probes are no whole number.
    ValueError
        If the shapes differ, A or B is zero, or there are fewer than 2 probes.

    Notes
    -----
    A product of each with a block (m, probes). The three means are unbiased; their ratio has a bias
    of the order of error^2, which falls as 1 / probes while the error falls as its root. The means
    are those of one inner product, by which the ratio keeps to its range; a correction of the bias
    would not. 1 less the cosine is computed from A v / norm(A)_F - B v / norm(B)_F, without
    cancellation. Runs under `jit`.

    References
    ----------
    Cristianini, Shawe-Taylor, Elisseeff, Kandola 2001, "On kernel-target alignment"; Hutchinson
    1990; Efron and Stein 1981.

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A, B = (as_operator(jnp.diag(jnp.array(d))) for d in ([3.0, 4.0], [4.0, 3.0]))
    >>> round(float(alignment(jax.random.key(0), A, B).value), 4)
    0.96
    """
    found, sizes = _alignment(_products(key, A, B, probes))
    _not_zero("A", sizes[0])
    _not_zero("B", sizes[1])
    return found


@jax.jit
def _alignment(u: jax.Array) -> tuple[Estimate, jax.Array]:
    """Estimate the cosine of two kernels from their products (2, n, probes), and their sizes."""
    u = u / scale_of(u, (1, 2))
    sizes = jnp.sqrt(jnp.mean(_squares(u), axis=0))
    u = u / sizes[:, None, None]
    samples = jnp.concatenate([_squares(u), _squares(u[:1] - u[1:])], axis=1)

    def cosine(means: jax.Array) -> jax.Array:
        # 2 <a, b> = a^2 + b^2 - (a - b)^2
        a, b = jnp.sqrt(means[0]), jnp.sqrt(means[1])
        return 1 - (means[2] - (a - b) ** 2) / (2 * a * b)

    return _jackknife(cosine, samples), sizes


def relative_change(
    key: jax.Array, A: KernelOperator, B: KernelOperator, *, probes: int = 32
) -> Estimate:
    """Estimate norm(A - B)_F / norm(B)_F, as `relative_kernel_change` computes it of arrays.

    Parameters
    ----------
    key : key
    A, B : KernelOperator
        Of one shape, (n, m).
    probes : int
        Random vectors of signs, 2 or more; the same for both norms.

    Returns
    -------
    Estimate
        With its jackknife error. An operator and itself have exactly 0 and an error of 0.

    Raises
    ------
    TypeError
        If A or B is no operator, or the probes are no whole number.
    ValueError
        If the shapes differ, B is zero, or there are fewer than 2 probes.

    Notes
    -----
    A product of each with a block (m, probes), whose difference is (A - B) v; changes below the
    rounding of the products are not seen. Both squares are unbiased; the root of their ratio has a
    bias of the order of error^2 / value. Runs under `jit`.

    References
    ----------
    Hutchinson 1990; Efron and Stein 1981.

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A, B = (as_operator(jnp.diag(jnp.array(d))) for d in ([3.0, 4.0], [3.0, 0.0]))
    >>> round(float(relative_change(jax.random.key(0), A, B).value), 4)
    1.3333
    """
    found, size = _change(_products(key, A, B, probes))
    _not_zero("B", size)
    return found


@jax.jit
def _change(u: jax.Array) -> tuple[Estimate, jax.Array]:
    """Estimate the relative change from products (2, n, probes), and the size of the second."""
    scales = scale_of(u[0] - u[1]), scale_of(u[1])
    samples = _squares(jnp.stack([(u[0] - u[1]) / scales[0], u[1] / scales[1]]))
    found = _jackknife(lambda means: jnp.sqrt(means[0] / means[1]), samples)
    unit = scales[0] / scales[1]
    return Estimate(unit * found.value, unit * found.error), jnp.mean(samples[:, 1])


def effective_rank(
    key: jax.Array, A: KernelOperator, *, probes: int = 32, depth: int = 64
) -> Estimate:
    """Estimate the exponential of the entropy of the normalised spectrum, by Lanczos quadrature.

    erank = exp(-sum_i p_i log p_i) = exp(log t - s / t),  t = tr A,  s = tr A log A

    Parameters
    ----------
    key : key
    A : KernelOperator
        Symmetric and positive semi-definite; a ridge counts as part of it.
    probes : int
        Random vectors of signs, 2 or more.
    depth : int
        Steps of Lanczos; at most n count.

    Returns
    -------
    Estimate
        At most n, and its jackknife error.

    Raises
    ------
    TypeError
        If A is no operator, or a number is not whole.
    ValueError
        If A is not symmetric and positive semi-definite, or is zero, the depth is less than 1, or
        there are fewer than 2 probes.

    Notes
    -----
    `depth` products with blocks (n, probes), probes x depth x n numbers of memory. At full depth
    both traces are unbiased, and exact for a diagonal A; the exponential has a bias of the order of
    error^2 / value. Too small a depth makes the rank too large, never too small, as Gauss
    quadrature is below the integral of x log x, whose even derivatives are positive; the standard
    error does not speak of it. Runs under `jit`.

    References
    ----------
    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality"; Ubaru, Chen,
    Saad 2017 (the quadrature); Golub and Meurant 2010, theorem 6.3 (the sign of its error).

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 1.0, 0.0])))
    >>> round(float(effective_rank(jax.random.key(0), A).value), 4)
    2.0
    """
    density = spectral_density(key, A, probes=probes, depth=depth)
    found, trace = _rank(density.nodes, density.weights, A.shape[0])
    _not_zero("A", trace)
    return found


@partial(jax.jit, static_argnums=2)
def _rank(nodes: jax.Array, weights: jax.Array, n: int) -> tuple[Estimate, jax.Array]:
    """Estimate the effective rank from quadratures (probes, depth) of order n, and a size of A."""
    nodes = jnp.maximum(nodes, 0) / scale_of(nodes)
    entropy = jax.scipy.special.entr(nodes)
    samples = jnp.sum(weights[:, None] * jnp.stack([nodes, entropy], axis=1), axis=2)
    found = _jackknife(lambda mean: n * mean[0] * jnp.exp(mean[1] / mean[0]), samples)
    return found, jnp.mean(samples[:, 0])
