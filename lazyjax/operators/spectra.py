"""The spectrum of a kernel that is known by its products: its top, and its density."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.operators.algebra import KernelOperator
from lazyjax.operators.lanczos import lanczos
from lazyjax.operators.solves import NotConverged, symmetric


class Eigenpairs(NamedTuple):
    """The largest eigenvalues.

    Attributes
    ----------
    values : (k,)
        Descending.
    vectors : (n, k)
        Orthonormal columns.
    residuals : (k,)
        norm(A u - lambda u), by the recursion, and rounding; an eigenvalue of A is within it of
        each value.
    """

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array


class SpectralDensity(NamedTuple):
    """A measure of mass 1 on the eigenvalues, a quadrature for each probe.

    Attributes
    ----------
    nodes, weights : (probes, depth)
        Of sum_i w_i f(node_i), an estimate of tr f(A) / n; the weights of a probe sum to 1.
    """

    nodes: jax.Array
    weights: jax.Array

    def mean(self, f: Callable) -> tuple[jax.Array, jax.Array]:
        """Estimate tr f(A) / n, for a function f of an array of eigenvalues.

        Returns
        -------
        value, error : (...)
            f may give further axes after those of the nodes.
        """
        values = f(self.nodes)
        weights = self.weights.reshape(self.weights.shape + (1,) * (values.ndim - 2))
        a_probe = jnp.sum(weights * values, axis=1)
        error = jnp.std(a_probe, axis=0, ddof=1) / a_probe.shape[0] ** 0.5
        return jnp.mean(a_probe, axis=0), error

    def cumulative(self, x: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Estimate the share of the eigenvalues that are at most x.

        Parameters
        ----------
        x : (m,)

        Returns
        -------
        value, error : (m,)
        """
        x = jnp.asarray(x)
        return self.mean(lambda t: (t[..., None] <= x[None, None]).astype(t.dtype))

    def density(self, x: ArrayLike, *, width: float) -> tuple[jax.Array, jax.Array]:
        """Estimate the density of log(lambda) at log(x), smoothed by a normal density.

        Parameters
        ----------
        x : (m,)
            Positive eigenvalues, such as a `jnp.geomspace`.
        width : float
            Standard deviation, of log(lambda).

        Returns
        -------
        value, error : (m,)
            The integral over log(x) is 1, but for eigenvalues that are not positive.

        Raises
        ------
        ValueError
            If x or the width is not positive.
        """
        checks.positive("x", x)
        checks.positive("width", width)
        log_x = jnp.log(jnp.asarray(x))

        def normal(t):
            # what is not positive is far to the left of every x
            log_t = jnp.log(jnp.maximum(t, 0))[..., None]
            return jax.scipy.stats.norm.pdf(log_x[None, None], log_t, width)

        return self.mean(normal)


def top_eigenpairs(
    key: jax.Array,
    A: KernelOperator,
    k: int,
    *,
    tolerance: float | None = None,
    depth: int = 1024,
) -> Eigenpairs:
    """Compute the k largest eigenvalues and their vectors, by Lanczos with reorthogonalisation.

    Parameters
    ----------
    key : key
        Of the random start.
    A : KernelOperator
        Symmetric and positive semi-definite.
    k : int
        At most n.
    tolerance : float, optional
        Of norm(A u - lambda u) / lambda_max; epsilon^(2/3) by default, 4e-11 in float64. The
        eigenvalues are closer, by the square of it over their gaps.
    depth : int
        Steps at most; they double until the tolerance is met.

    Returns
    -------
    Eigenpairs

    Raises
    ------
    TypeError
        If A is no operator, or a number is not whole.
    ValueError
        If A is not symmetric and positive semi-definite, k is not in 1 to n, or the tolerance or
        the depth is not positive.
    NotConverged
        If the tolerance is not met at the greatest depth; its `solution` is what there is.

    Notes
    -----
    About twice the last depth products with one vector, and depth x n numbers of memory. One start
    finds one vector of an eigenvalue that is repeated exactly, as those of a kernel (N, N) that is
    taken for K outputs: keep that kernel (N, N). Not under `jit`.

    References
    ----------
    Parlett 1998, section 13.2 (the bound on the residual); Golub and Van Loan 2013, section 10.1.

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 3.0, 2.0])))
    >>> top_eigenpairs(jax.random.key(0), A, 2).values.round(4).tolist()
    [3.0, 2.0]
    """
    symmetric(A)
    n = A.shape[0]
    checks.whole("k", k, least=1)
    checks.whole("depth", depth, least=1)
    if k > n:
        raise ValueError(f"`k` must be at most the order of `A`, {n}, got {k}. Use fewer.")
    within = float(jnp.finfo(A.dtype).eps) ** (2 / 3) if tolerance is None else tolerance
    checks.positive("tolerance", within)
    start = jax.random.normal(key, (1, n), A.dtype)
    limit = min(max(depth, k), n)
    steps = min(max(2 * k, 32), limit)
    while True:
        found = lanczos(A, start, depth=steps)
        values, inner = jnp.linalg.eigh(found.matrix[0])
        largest = jnp.max(jnp.abs(values))
        values, inner = values[::-1][:k], inner[:, ::-1][:, :k]
        bounds = jnp.abs(found.off[0, -1] * inner[-1]) + jnp.finfo(A.dtype).eps * largest
        if jnp.all(bounds <= within * largest) or steps == limit:
            break
        steps = min(2 * steps, limit)
    vectors = jnp.matmul(found.vectors[0].T, inner, precision="highest")
    pairs = Eigenpairs(values, vectors, bounds)
    # a vector of no length: the Krylov space of the start has fewer than k dimensions
    missing = jnp.sum(jnp.linalg.norm(vectors, axis=0) < 0.5)
    if missing:
        raise NotConverged(
            f"`k` must be at most the number of distinct eigenvalues, got {k}, of which {missing} "
            "are missing. Use fewer.",
            pairs,
        )
    if jnp.any(bounds > within * largest):
        raise NotConverged(
            f"`tolerance` must be met in {limit} steps, {within:.1e}, got residuals of "
            f"{jnp.max(bounds) / largest:.1e} lambda_max. Use a larger `depth`, or a smaller k.",
            pairs,
        )
    return pairs


def spectral_density(
    key: jax.Array, A: KernelOperator, *, probes: int = 16, depth: int = 64
) -> SpectralDensity:
    """Estimate the density of the eigenvalues, by stochastic Lanczos quadrature.

    Parameters
    ----------
    key : key
    A : KernelOperator
        Symmetric and positive semi-definite.
    probes : int
        2 or more.
    depth : int
        Steps of Lanczos, the points of each quadrature; at most n count.

    Returns
    -------
    SpectralDensity
        Of mass 1, with standard errors over the probes.

    Raises
    ------
    TypeError
        If A is no operator, or a number is not whole.
    ValueError
        If A is not symmetric and positive semi-definite, or there are fewer than 2 probes.

    Notes
    -----
    `depth` products with blocks (n, probes), probes x depth x n numbers of memory. The first
    2 depth - 1 moments are those of each probe exactly; detail finer than the spacing of the nodes
    is not seen, and the standard errors do not speak of it. Runs under `jit`.

    References
    ----------
    Lin, Saad, Yang 2016, section 3.2; Ghorbani, Krishnan, Xiao 2019.

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> found = spectral_density(jax.random.key(0), as_operator(jnp.diag(jnp.array([1.0, 3.0]))))
    >>> found.cumulative(jnp.array([0.5, 2.0, 4.0]))[0].round(4).tolist()
    [0.0, 0.5, 1.0]
    """
    symmetric(A)
    checks.whole("probes", probes, least=2, cure="One has no standard error.")
    checks.whole("depth", depth, least=1)
    v = jax.random.rademacher(key, (probes, A.shape[0]), A.dtype)
    nodes, vectors = jnp.linalg.eigh(lanczos(A, v, depth=min(depth, A.shape[0])).matrix)
    return SpectralDensity(nodes, vectors[:, 0] ** 2)
