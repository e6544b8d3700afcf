"""Traces of a kernel and of its logarithm and inverse, from random vectors.

For a probe v, v^T f(A) v is an integral over the spectrum, and Lanczos gives quadratures of it
that bracket its value (Golub and Meurant 2010).
"""

import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.norms import eigh, scale_of
from lazyjax.operators.algebra import KernelOperator, operator, require_symmetric
from lazyjax.operators.krylov import Tridiagonal, lanczos
from lazyjax.operators.preconditioners import Nystrom, nystrom

FIRST = 16  # steps of Lanczos at first; they double
# f, and whether Gauss is its upper end: so it is for log, whose even derivatives are negative and
# odd ones positive. For 1/x all are the other way round.
FUNCTIONS = {"log": (jnp.log, True), "inverse": (jnp.reciprocal, False)}


class TraceEstimate(NamedTuple):
    """A trace from random vectors.

    Attributes
    ----------
    value : ()
        The middle of the bracket.
    error : ()
        Standard error over the probes.
    lower, upper : ()
        Means of the two quadratures: what infinite depth would give for these probes is between
        them. The trace is in [lower - 3 error, upper + 3 error] but for bad luck.
    depth : int
        Steps of Lanczos.
    """

    value: jax.Array
    error: jax.Array
    lower: jax.Array
    upper: jax.Array
    depth: int


class Bracket(NamedTuple):
    """The quadratures of each probe, (B,); the smallest node, the largest entry of T, ()."""

    low: jax.Array
    high: jax.Array
    smallest: jax.Array
    largest: jax.Array


@partial(jax.jit, static_argnames=("of", "depth"))
def quadratures(
    A: KernelOperator, probes: jax.Array, lower: jax.Array, *, of: str, depth: int
) -> Bracket:
    """Bracket v^T f(A) v for every probe v.

    Parameters
    ----------
    A : KernelOperator
        Symmetric, (n, n).
    probes : (B, n)
    lower : ()
        Above 0, at or below the spectrum.
    of : str
        A row of FUNCTIONS.
    depth : int
        At most n.

    Returns
    -------
    Bracket

    References
    ----------
    Golub and Meurant 2010, section 6.2 (quadrature from Lanczos, the node of Gauss-Radau) and
    theorems 6.3 and 6.4 (the signs).
    """
    f, gauss_is_upper = FUNCTIONS[of]
    tridiagonal = lanczos(A, probes, depth=depth)

    # Gauss-Radau: T gets one more row, whose diagonal entry makes `lower` an eigenvalue:
    # lower + beta^2 / d, with d the last pivot of T - lower I
    def pivot(before: jax.Array, entries: tuple) -> tuple[jax.Array, None]:
        diagonal, off = entries
        return jnp.maximum(diagonal - lower - off * (off / before), floor), None

    floor = jnp.finfo(A.dtype).eps * jnp.max(tridiagonal.diagonal, axis=1) + jnp.finfo(A.dtype).tiny
    before = jnp.pad(tridiagonal.off[:, :-1], ((0, 0), (1, 0)))
    d, _ = jax.lax.scan(pivot, jnp.ones_like(floor), (tridiagonal.diagonal.T, before.T))
    entry = lower + tridiagonal.off[:, -1] * (tridiagonal.off[:, -1] / d)
    longer = Tridiagonal(
        vectors=tridiagonal.vectors,
        diagonal=jnp.concatenate([tridiagonal.diagonal, entry[:, None]], axis=1),
        off=jnp.pad(tridiagonal.off, ((0, 0), (0, 1))),
    )
    radau_matrix = longer.matrix
    # Gauss: T itself, the last row apart from it
    gauss_matrix = radau_matrix.at[:, -1, :-1].set(0).at[:, :-1, -1].set(0)
    nodes, vectors = eigh(jnp.stack([gauss_matrix, radau_matrix]))
    weights = vectors[:, :, 0] ** 2
    # a node that rounding has put below the spectrum is moved to its end
    values = jnp.sum(weights * f(jnp.maximum(nodes, lower)), axis=2)
    gauss, radau = values * jnp.sum(probes**2, axis=1)[None]
    low, high = (radau, gauss) if gauss_is_upper else (gauss, radau)
    seen = jnp.where(weights[0] > jnp.finfo(A.dtype).eps, nodes[0], lower)
    return Bracket(low, high, jnp.min(seen), jnp.max(tridiagonal.diagonal))


def random_signs(key: jax.Array, A: KernelOperator, probes: int) -> jax.Array:
    """Draw signs (probes, n), n the columns; v^T v is n, so that a shift adds no variance."""
    checks.whole("probes", probes, least=2, cure="One has no standard error.")
    return jax.random.rademacher(key, (probes, A.shape[1]), A.dtype)


def _standard_error(values: jax.Array) -> jax.Array:
    scale = scale_of(values)  # squares need not be in range
    return scale * jnp.std(values / scale, ddof=1) / values.size**0.5


def _bound(A: KernelOperator, lower: ArrayLike | None) -> jax.Array:
    if lower is None and not A.shift > 0:
        raise ValueError(
            "`lower` must be given for an operator without a ridge, got a shift of "
            f"{A.shift}. Pass a positive lower bound of its spectrum, or add a ridge: A + c."
        )
    checks.positive("lower", A.shift if lower is None else lower, "Pass a bound above 0.")
    return A.shift if lower is None else jnp.asarray(lower, A.dtype)


def _estimate(
    A: KernelOperator,
    v: jax.Array,
    of: str,
    lower: jax.Array,
    depth: int,
    known: jax.Array | float = 0.0,
) -> TraceEstimate:
    """Deepen until the bracket is narrower than the error; add what is known."""
    checks.whole("depth", depth, least=1)
    depth = min(depth, A.shape[0])
    eps, steps = jnp.finfo(A.dtype).eps, min(FIRST, depth)
    while True:
        low, high, smallest, largest = quadratures(A, v, lower, of=of, depth=steps)
        if smallest < lower - 100 * eps * largest:
            raise ValueError(
                f"`lower` must be a lower bound of the spectrum, got {lower:.3e} with an "
                f"eigenvalue at or below {smallest:.3e}. Pass a smaller one; a kernel with "
                'negative eigenvalues wants precision="highest"'
                + (", or float64." if A.dtype != np.float64 else ", or a ridge.")
            )
        error = _standard_error((low + high) / 2)
        width = jnp.mean(high - low)
        narrow = width <= jnp.maximum(error, 100 * eps * jnp.max(jnp.abs(high)))
        if narrow or steps == depth:
            break
        steps = min(2 * steps, depth)
    if not narrow and steps < A.shape[0]:
        warnings.warn(
            f"after {steps} steps of Lanczos the bracket, {width:.1e}, is still wider than the "
            f"standard error, {error:.1e}. It holds; a larger `depth` makes it narrower.",
            RuntimeWarning,
            stacklevel=3,
        )
    ends = known + jnp.stack([jnp.mean(low), jnp.mean(high)])
    ends = jnp.sort(ends)  # rounding, where both are exact
    return TraceEstimate(jnp.mean(ends), error, ends[0], ends[1], steps)


def _between(P: Nystrom, A: KernelOperator, v: jax.Array) -> jax.Array:
    """Multiply by P^-1/2 A P^-1/2."""
    return P.inverse_root(A @ P.inverse_root(v))


def logdet(
    key: jax.Array,
    A: KernelOperator,
    *,
    probes: int = 32,
    rank: int = 0,
    lower: ArrayLike | None = None,
    depth: int = 512,
) -> TraceEstimate:
    """Estimate log det A, with a bracket of two quadratures and a standard error.

    Parameters
    ----------
    key : key
    A : KernelOperator
        Symmetric and positive definite. That of A / A.shift = K / ridge + I is never negative and
        free of the kernel's scale.
    probes : int
        Random vectors of signs, 2 or more.
    rank : int
        Random rows of a preconditioner P (`nystrom`), whose log-determinant is known:
        log det A = log det P + tr log(P^-1/2 A P^-1/2), of fewer steps and a smaller error. 0 for
        none.
    lower : float, optional
        A positive lower bound of the spectrum; the ridge by default. With a rank it has no use.
    depth : int
        Steps of Lanczos at most; from 16 they double until the bracket is narrower than the
        standard error.

    Returns
    -------
    TraceEstimate

    Raises
    ------
    TypeError
        If A is no operator, or a number is not whole.
    ValueError
        If A is not symmetric and positive semi-definite, `lower` is not positive, is missing for an
        operator without a ridge or is found to be no lower bound, there are fewer than 2 probes,
        or `nystrom` refuses the rank.

    Warns
    -----
    RuntimeWarning
        If the bracket is still wider than the standard error at the greatest depth.

    Notes
    -----
    Gauss quadrature is the upper end, Gauss-Radau with a node at the lower bound the lower end.
    About twice the last depth products with blocks (n, probes); probes x depth x n numbers of
    memory. Not under `jit`: the depth follows from what is found.

    References
    ----------
    Golub and Meurant 2010, chapter 6; Ubaru, Chen, Saad 2017; Wenger et al. 2022 (with a
    preconditioner).

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 3.0])), ridge=1.0)
    >>> estimate = logdet(jax.random.key(0), A)
    >>> round(float(jnp.exp(estimate.value)), 3), estimate.depth
    (8.0, 2)
    """
    require_symmetric(A)
    checks.whole("rank", rank, least=0)
    if not rank:
        return _estimate(A, random_signs(key, A, probes), "log", _bound(A, lower), depth)
    rows, signs = jax.random.split(key)
    P, v = nystrom(rows, A, rank=rank), random_signs(signs, A, probes)
    product = Partial(_between, P, A)
    inner = operator(product, product, shape=A.shape, dtype=A.dtype, psd=True)
    # 1 is the bound, since A is nowhere below P
    return _estimate(inner, v, "log", jnp.ones((), A.dtype), depth, P.logdet())


def inverse_trace(
    key: jax.Array,
    A: KernelOperator,
    *,
    probes: int = 32,
    lower: ArrayLike | None = None,
    depth: int = 512,
) -> TraceEstimate:
    """Estimate tr A^-1, with a bracket of two quadratures and a standard error.

    Parameters
    ----------
    key, A, probes, lower, depth
        As in `logdet`.

    Returns
    -------
    TraceEstimate

    Raises
    ------
    TypeError, ValueError
        As `logdet`.

    Warns
    -----
    RuntimeWarning
        As `logdet`.

    Notes
    -----
    Gauss quadrature is the lower end, Gauss-Radau the upper. The small eigenvalues are what counts
    here: a preconditioner of a few rows, which knows the large ones, makes the error larger.

    References
    ----------
    Golub and Meurant 2010, chapter 11.

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 3.0])), ridge=1.0)
    >>> round(float(inverse_trace(jax.random.key(0), A).value), 3)
    0.75
    """
    require_symmetric(A)
    return _estimate(A, random_signs(key, A, probes), "inverse", _bound(A, lower), depth)


def trace(key: jax.Array, A: KernelOperator, *, probes: int = 32, rank: int = 0) -> TraceEstimate:
    """Estimate tr A, with a standard error.

    Parameters
    ----------
    key : key
    A : KernelOperator
        Symmetric and positive semi-definite.
    probes : int
        Random vectors of signs, 2 or more.
    rank : int
        Random rows (`nystrom`), whose part of the trace is known; the probes see what is left. A
        kernel has a few large eigenvalues, and without them the error is far smaller. 0 for none.

    Returns
    -------
    TraceEstimate
        Of depth 1, with `lower` and `upper` equal to the value.

    Raises
    ------
    TypeError
        If A is no operator, or a number is not whole.
    ValueError
        If A is not symmetric and positive semi-definite, there are fewer than 2 probes, or
        `nystrom` refuses the rank.

    Notes
    -----
    One product with a block (n, probes), and the rows. Runs under `jit`.

    References
    ----------
    Hutchinson 1990; Meyer, Musco, Musco, Woodruff 2021 (a known part of low rank).

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 3.0])))
    >>> float(trace(jax.random.key(0), A).value)
    4.0
    """
    require_symmetric(A)
    checks.whole("rank", rank, least=0)
    rows, signs = jax.random.split(key)
    v = random_signs(signs, A, probes).T
    values = jnp.sum(v * (A @ v), axis=0)
    if rank:
        F = nystrom(rows, A - A.shift + 1.0, rank=rank).factor  # of the base: the shift is free
        left = jnp.sum(jnp.matmul(F, v, precision="highest") ** 2, axis=0)
        values = values - left + jnp.sum(F**2)
    value = jnp.mean(values)
    return TraceEstimate(value, _standard_error(values), value, value, 1)
