"""The spectrum of a kernel that is known by its products: its top, and its density."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.norms import eigh, norm, scale_of
from lazyjax.operators.algebra import KernelOperator, require_symmetric
from lazyjax.operators.krylov import lanczos
from lazyjax.operators.solves import NotConverged, finer

_UNSEEN = 1e-4  # how little of a vector a random start may hold, of the usual n^-1/2


class Eigenpairs(NamedTuple):
    """The largest eigenvalues.

    Attributes
    ----------
    values : (k,)
        Descending.
    vectors : (n, k)
        Orthonormal columns.
    residuals : (k,)
        norm(A u - lambda u), computed from u; an eigenvalue of A is within it of each value.
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
        scale = scale_of(a_probe, 0)  # squares need not be in range
        error = scale[0] * jnp.std(a_probe / scale, axis=0, ddof=1) / a_probe.shape[0] ** 0.5
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


class _Found(NamedTuple):
    """Ritz pairs, descending: values (m,), rows (m, n); the worst residual, and if it will do."""

    values: np.ndarray
    vectors: np.ndarray
    residual: float
    sure: bool


@partial(jax.jit, static_argnames=("k", "depth"))
def _ritz(
    key: jax.Array, A: KernelOperator, known: np.ndarray, *, k: int, depth: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run Lanczos once in the complement of the rows known.

    Gives all Ritz values (depth,), descending, the norms of their residuals (depth,), and the
    vectors of the first k, rows.
    """
    key, start_key = jax.random.split(key)
    start = jax.random.normal(start_key, (1, A.shape[0]), A.dtype)
    tridiagonal = lanczos(A, start, depth=depth, without=known, key=key)
    values, inner = (a[0, ..., ::-1] for a in tridiagonal.eigh())
    residuals = jnp.abs(tridiagonal.off[0, -1] * inner[-1])
    vectors = jnp.matmul(inner[:, :k].T, tridiagonal.vectors[0], precision="highest")
    return values, residuals, vectors


def _above(
    key: jax.Array,
    A: KernelOperator,
    known: _Found,
    *,
    k: int,
    largest: float,
    within: float,
    depth: int,
) -> _Found:
    """Find up to k pairs above the k-th one known, in the complement of those known.

    None at all is sure once the largest Ritz value of the complement has converged. With the gap g
    to the k-th value, a residual below c g says that the start held less than c of every vector
    that it does not know of: the largest Ritz vector holds no less of such a one than the start.
    """
    n, m = A.shape[0], len(known.values)
    limit = min(max(depth, k), n - m)
    steps = min(32 if m else max(2 * k, 32), limit)
    while True:
        found = _ritz(jax.random.clone(key), A, known.vectors, k=k, depth=steps)
        values, residuals = map(np.asarray, found[:2])
        largest = np.maximum(largest, np.abs(values).max())
        allowed, above = within * largest, k
        if m:
            gap = known.values[-1] + allowed - values[0]
            above = min(k, int(np.sum(values > known.values[-1] + allowed)))
            allowed = allowed if above else np.maximum(allowed, _UNSEEN / n**0.5 * gap)
        worst = float(residuals[: max(above, 1)].max())
        sure = worst <= allowed
        if sure or steps == limit:
            return _Found(values[:above], np.asarray(found[2])[:above], worst, bool(sure))
        steps = min(2 * steps, limit)


def top_eigenpairs(
    key: jax.Array,
    A: KernelOperator,
    k: int,
    *,
    tolerance: float | None = None,
    depth: int = 1024,
) -> Eigenpairs:
    """Compute the k largest eigenvalues and their vectors, by Lanczos with reorthogonalisation.

    Repeated ones count as often as they are there.

    Parameters
    ----------
    key : key
        Of the random starts.
    A : KernelOperator
        Symmetric and positive semi-definite.
    k : int
        At most n.
    tolerance : float, optional
        Of norm(A u - lambda u) / lambda_max; epsilon^(2/3) by default, 4e-11 in float64. The
        eigenvalues are closer, by the square of it over their gaps.
    depth : int
        Steps of a run at most; they double until the tolerance is met.

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
        If the tolerance is not met at the greatest depth, or by the vectors themselves; its
        `solution` is what there is.

    Notes
    -----
    One start sees one vector of an eigenvalue that is repeated. So where k > 1 the pairs found are
    held fast and further runs, each from a new random vector, look for larger ones than the k-th in
    their complement until there are none: one run more if nothing is repeated, r more if an
    eigenvalue is r times there. The first run takes about twice its last depth products with one
    vector, a further one as many as its largest value needs, 64 or more; at the end there is one
    product with a block (n, k). depth x n numbers of memory. A kernel (N, N) that is taken for K
    outputs repeats everything K times: keep it (N, N). Not under `jit`.

    References
    ----------
    Parlett 1998, sections 13.2 (the bound on the residual) and 13.10 (a vector of a repeated
    eigenvalue); Golub and Van Loan 2013, section 10.1.

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 3.0, 2.0])))
    >>> top_eigenpairs(jax.random.key(0), A, 2).values.round(4).tolist()
    [3.0, 2.0]
    """
    require_symmetric(A)
    n = A.shape[0]
    checks.whole("k", k, least=1)
    checks.whole("depth", depth, least=1)
    if k > n:
        raise ValueError(f"`k` must be at most the order of `A`, {n}, got {k}. Use fewer.")
    within = float(jnp.finfo(A.dtype).eps) ** (2 / 3) if tolerance is None else tolerance
    checks.positive("tolerance", within)

    # to half the tolerance: what the vectors held fast still couple to comes in addition
    known = _Found(np.zeros(0, A.dtype), np.zeros((0, n), A.dtype), 0.0, True)
    largest, sure, residual = 0.0, True, 0.0
    while sure:
        key, start = jax.random.split(key)
        new = _above(start, A, known, k=k, largest=largest, within=within / 2, depth=depth)
        sure, residual = new.sure, new.residual
        if not len(new.values):
            break
        values = np.concatenate([known.values, new.values])
        order = np.argsort(-values)[:k]
        vectors = np.concatenate([known.vectors, new.vectors])[order]
        known = known._replace(values=values[order], vectors=vectors)
        largest = np.abs(values).max()
        if k in (1, n):
            break
    pairs = _rotated(A, known.vectors.T)
    largest = np.abs(pairs.values).max()
    if not sure:
        raise NotConverged(
            f"`tolerance` must be met in {min(max(depth, k), n)} steps, {within:.1e}, got "
            f"residuals of {residual / largest:.1e} lambda_max. Use a larger `depth`, or a smaller "
            "k.",
            pairs,
        )
    worst = np.max(pairs.residuals)
    if worst > within * largest:
        raise NotConverged(
            f"`tolerance` must be met by A u - lambda u, {within:.1e}, got "
            f"{worst / largest:.1e} lambda_max. Rounding in {A.dtype} or in the "
            f'products allows no less: use a kernel at precision="highest", or {finer(A.dtype)}.',
            pairs,
        )
    return pairs


@jax.jit
def _rotated(A: KernelOperator, U: ArrayLike) -> Eigenpairs:
    """Give the eigenpairs of A in the span of U (n, k), with their residuals."""
    U, _ = jnp.linalg.qr(U)
    product = A @ U
    square = jnp.matmul(U.T, product, precision="highest")
    values, rotation = eigh(square)
    values, rotation = values[::-1], rotation[:, ::-1]
    U, product = (jnp.matmul(a, rotation, precision="highest") for a in (U, product))
    return Eigenpairs(values, U, jax.vmap(norm, 1)(product - U * values[None]))


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
    >>> density = spectral_density(jax.random.key(0), as_operator(jnp.diag(jnp.array([1.0, 3.0]))))
    >>> density.cumulative(jnp.array([0.5, 2.0, 4.0]))[0].round(4).tolist()
    [0.0, 0.5, 1.0]
    """
    require_symmetric(A)
    checks.whole("probes", probes, least=2, cure="One has no standard error.")
    checks.whole("depth", depth, least=1)
    v = jax.random.rademacher(key, (probes, A.shape[0]), A.dtype)
    nodes, vectors = lanczos(A, v, depth=min(depth, A.shape[0])).eigh()
    return SpectralDensity(nodes, vectors[:, 0] ** 2)
