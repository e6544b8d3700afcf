"""What a Gaussian process knows of test points: its posterior variance, by solves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.blocks import starts
from lazyjax.operators.algebra import KernelOperator, as_operator, require_symmetric
from lazyjax.operators.solves import solve


@jax.jit
def _left(diagonal: jax.Array, rows: jax.Array, x: jax.Array) -> jax.Array:
    return diagonal - jnp.sum(rows * x.T, axis=1)


def posterior_variance(
    A: KernelOperator,
    k_test_train: ArrayLike | KernelOperator,
    k_test_diagonal: ArrayLike,
    *,
    tolerance: float | None = None,
    iterations: int = 1000,
    preconditioner: Callable[[jax.Array], jax.Array] | None = None,
    block: int = 64,
) -> jax.Array:
    """Compute the posterior variance of a Gaussian process at test points.

    k(x, x) - k(x, X) (K + noise I)^-1 k(X, x)

    Parameters
    ----------
    A : KernelOperator
        K + noise I of the training points, (n, n): the noise, a variance, is its shift.
    k_test_train : (M, N, *out, *out), (M, N) or KernelOperator
        The kernel of test and training points, from `ntk`, or from `ntk_operator`, of which only
        the rows of a block are made at once.
    k_test_diagonal : (m,)
        k(x, x), an entry for each row of `k_test_train`: the `diagonal()` of an operator of the
        test points.
    tolerance, iterations, preconditioner
        As for `solve`.
    block : int
        Test points that are solved for at once, as rows of `k_test_train`; whole examples.

    Returns
    -------
    (m,) array
        Of the function; that of a new observation has the noise added. It is not clipped: what is
        below 0 by more than rounding of k(x, x) says that the diagonal is not of this kernel.

    Raises
    ------
    TypeError
        If A is no operator, an array holds no floats, or a number is not whole.
    ValueError
        If A is not symmetric and positive semi-definite, the kernels do not fit, or a number is out
        of its range.
    NotConverged
        If a solve does not reach its tolerance.

    Notes
    -----
    The solves of m right-hand sides, `block` at once; O(n block) numbers of memory and one product
    a step and block. Conjugate gradients from zero approach the subtracted term from below, with an
    error of the square of that of the solution in the norm of A: the variance comes out too large,
    not too small, but for rounding. Where all of k(x, x) is explained, what is left has the
    rounding of k(x, x). Not under `jit`: there, take `conjugate_gradients`.

    With the empirical NTK as its kernel this is the posterior of the tangent model with a Gaussian
    prior on its weights, not the spread of trained networks.

    References
    ----------
    Rasmussen and Williams 2006, equation 2.26; Strakos and Tichy 2002 (the error in the norm of A).

    Examples
    --------
    >>> A = as_operator(jnp.eye(2), ridge=1.0)
    >>> posterior_variance(A, jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.ones(2)).tolist()
    [0.5, 1.0]
    """
    require_symmetric(A)
    if isinstance(k_test_train, KernelOperator):
        cross = k_test_train
    else:
        checks.floating("k_test_train", k_test_train)
        cross = as_operator(k_test_train)
    if cross.shape[1] != A.shape[0]:
        raise ValueError(
            f"`k_test_train` must have {A.shape[0]} columns, as `A` has, got shape {cross.shape}. "
            "Use ntk(f, params, x_test, x_train)."
        )
    checks.floating("k_test_diagonal", k_test_diagonal)
    diagonal = jnp.asarray(k_test_diagonal)
    if diagonal.shape != (cross.shape[0],):
        raise ValueError(
            f"`k_test_diagonal` must have shape ({cross.shape[0]},), got {diagonal.shape}. Use "
            "ntk_operator(f, params, x_test).diagonal()."
        )
    checks.whole("block", block, least=1)
    count, k = cross.shape[0] // cross.outputs, cross.outputs
    size = min(max(1, block // k), count)
    variance = jnp.zeros(diagonal.shape, A.dtype)
    for start in starts(count, size):
        rows = cross.rows_of(jnp.arange(start, start + size)).astype(A.dtype)
        x = solve(
            A, rows.T, tolerance=tolerance, iterations=iterations, preconditioner=preconditioner
        ).x
        at = slice(start * k, (start + size) * k)
        variance = variance.at[at].set(_left(diagonal[at].astype(A.dtype), rows, x))
    return variance
