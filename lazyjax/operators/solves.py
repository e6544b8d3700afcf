"""Linear systems with a kernel, solved to a tolerance by conjugate gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.norms import scale_of
from lazyjax.operators.algebra import KernelOperator, require_symmetric
from lazyjax.operators.iterations import advance, begin, preconditioning, right_hand_side, sizes

CHUNK = 32  # steps a jitted call
RESTARTS = 4  # from the true residual, where the recursion has drifted away from it


class Solution(NamedTuple):
    """What `solve` found.

    Attributes
    ----------
    x : (n,) or (n, B)
    residuals : (iterations + 1,) or (iterations + 1, B)
        norm(b - A x) / norm(b) after each step, by the recursion; the last row is computed from x.
    iterations : int
        Products with blocks of vectors, but for one more a computed residual.
    converged : bool
        Whether every column of the last row is within the tolerance.
    """

    x: jax.Array
    residuals: jax.Array
    iterations: int
    converged: bool


class NotConverged(RuntimeError):
    """An iteration that ended before its tolerance; `solution` is what it had by then."""

    def __init__(self, message: str, solution: tuple):
        super().__init__(message)
        self.solution = solution


def finer(dtype: np.dtype) -> str:
    """Say what there is where rounding allows no less."""
    return "a looser `tolerance`" if dtype == np.float64 else "float64"


@jax.jit
def _residual(A: KernelOperator, b: jax.Array, x: jax.Array) -> jax.Array:
    return b - A @ x


def solve(
    A: KernelOperator,
    b: ArrayLike,
    *,
    tolerance: float | None = None,
    iterations: int = 1000,
    preconditioner: Callable[[jax.Array], jax.Array] | None = None,
) -> Solution:
    """Solve A x = b by preconditioned conjugate gradients, for several right-hand sides at once.

    Parameters
    ----------
    A : KernelOperator
        Symmetric and positive definite, as K + ridge is.
    b : (n,) or (n, B)
        y.reshape(-1) for values y (N, *out).
    tolerance : float, optional
        Of norm(b - A x) / norm(b), in each column; the root of the dtype's epsilon by default,
        1.5e-8 in float64.
    iterations : int
        At most.
    preconditioner : Nystrom or function, optional
        (n, B) -> (n, B), symmetric and positive definite, near the inverse of A. A function that is
        made anew for every call compiles anew.

    Returns
    -------
    Solution

    Raises
    ------
    TypeError
        If A is no operator, b holds no floats, the iterations are no whole number, or the
        preconditioner is no function.
    ValueError
        If A is not symmetric and positive semi-definite, b does not fit or is not finite, the
        tolerance is not positive, the iterations are fewer than 1, or x is beyond the range of the
        dtype.
    NotConverged
        If a column is not within the tolerance at the end; its `solution` is what there is.

    Notes
    -----
    A product with a block (n, B) a step. The residual is computed once more from x at the end and
    that is what counts; where rounding has let the recursion drift from it, the iteration starts
    again from x. The error falls in the norm of A, the residual need not. No less than about
    epsilon times the condition number can be reached. Free of the scales of A and of each column of
    b. Not under `jit`, as it ends when it is done: there, and for derivatives, take
    `conjugate_gradients`.

    References
    ----------
    Hestenes and Stiefel 1952; Golub and Van Loan 2013, algorithm 11.5.1; van der Vorst and Ye 2000
    (residual replacement).

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 3.0])), ridge=1.0)
    >>> solve(A, jnp.array([2.0, 4.0])).x.round(4).tolist()
    [1.0, 1.0]
    """
    require_symmetric(A)
    b = right_hand_side(A, b)
    within = float(jnp.finfo(A.dtype).eps) ** 0.5 if tolerance is None else tolerance
    checks.positive("tolerance", within)
    checks.whole("iterations", iterations, least=1)
    M = preconditioning(preconditioner)

    block = b.astype(A.dtype).reshape(b.shape[0], -1)
    order = scale_of(block, 0)
    block = block / order
    norms = np.asarray(sizes(block))
    scale, target = np.where(norms == 0, 1, norms), jnp.asarray(within * norms, A.dtype)
    x, r, taken, converged = jnp.zeros_like(block), block, 0, False
    history = [norms / scale]
    for _ in range(1 + RESTARTS):
        before = history[-1].max()
        state = begin(M, x, r, target, jnp.asarray(taken))
        while taken < iterations and bool(jnp.any(state.running)):
            state, lengths = advance(A, M, state, target, jnp.asarray(iterations), length=CHUNK)
            history += list(np.asarray(lengths)[: int(state.step) - taken] / scale)
            taken = int(state.step)
        x, r = state.x, _residual(A, block, state.x)
        history[-1] = np.asarray(sizes(r)) / scale
        converged = bool(np.all(history[-1] <= within))
        if converged or taken >= iterations or not history[-1].max() < before / 2:
            break

    x = order * x
    if converged and not jnp.all(jnp.isfinite(x)):
        raise ValueError(
            f"`b` must have an x in the range of {A.dtype}, got values beyond it. Divide `b` by "
            "its size, and multiply what is made of x by it."
        )
    solution = Solution(
        x=x.reshape(b.shape),
        residuals=jnp.asarray(np.stack(history)).reshape(-1, *b.shape[1:]),
        iterations=taken,
        converged=converged,
    )
    if not converged:
        cure = (
            "Use more `iterations`, a larger ridge, or a preconditioner of larger rank."
            if taken >= iterations
            else f"Rounding in {A.dtype} allows no less: use a larger ridge, or {finer(A.dtype)}."
        )
        raise NotConverged(
            f"`tolerance` must be reached, {within:.1e}, got relative residuals of up to "
            f"{history[-1].max():.1e} after {taken} iterations. {cure}",
            solution,
        )
    return solution
