"""Linear systems with a kernel: conjugate gradients, and a preconditioner of random rows."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.norms import eigh, scale_of
from lazyjax.operators.algebra import KernelOperator

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


class Nystrom(NamedTuple):
    """P = F^T F + shift I, a preconditioner from random rows of a kernel; made by `nystrom`.

    Called with a block (n, B), it gives P^-1 times it.

    Attributes
    ----------
    factor : (r, n)
        F, whose rows are orthogonal.
    values : (r,)
        Their squared norms, the eigenvalues of F^T F; ascending.
    shift : ()
    """

    factor: jax.Array
    values: jax.Array
    shift: jax.Array

    def __call__(self, v: jax.Array) -> jax.Array:
        """Compute P^-1 v = (v - F^T (S + shift)^-1 F v) / shift."""
        inside = _dot(self.factor, v) / (self.values + self.shift)[:, None]
        return (v - _dot(self.factor.T, inside)) / self.shift

    def inverse_root(self, v: jax.Array) -> jax.Array:
        """Compute P^-1/2 v, v (n, B)."""
        small, large = jnp.sqrt(self.shift), jnp.sqrt(self.values + self.shift)
        # (1 / large - 1 / small) / (large^2 - small^2), without its cancellation, nor a number of
        # the order of shift^3/2, which need not be in range
        inside = _dot(self.factor, v) / large[:, None] / (large + small)[:, None] / small
        return v / small - _dot(self.factor.T, inside)

    def logdet(self) -> jax.Array:
        """Compute log det P."""
        size = self.factor.shape[1]
        return size * jnp.log(self.shift) + jnp.sum(jnp.log1p(self.values / self.shift))


_dot = partial(jnp.matmul, precision="highest")


def finer(dtype: np.dtype) -> str:
    """Say what there is where rounding allows no less."""
    return "a looser `tolerance`" if dtype == np.float64 else "float64"


def require_symmetric(A: KernelOperator) -> KernelOperator:
    """Require an operator that is symmetric and positive semi-definite."""
    if not isinstance(A, KernelOperator):
        raise TypeError(
            f"`A` must be a KernelOperator, got {type(A).__name__}. Use as_operator(kernel)."
        )
    if not A.psd:
        raise ValueError(
            "`A` must be symmetric and positive semi-definite, got an operator of shape "
            f"{A.shape} that is not known to be. Use the kernel of a batch with itself."
        )
    return A


class _State(NamedTuple):
    """Conjugate gradients for B columns: iterate, residual, direction, r . P^-1 r, who runs.

    P^-1 is taken over the scale of what it makes of the first residual, and `scale` is that.
    """

    x: jax.Array
    r: jax.Array
    p: jax.Array
    scale: jax.Array
    rz: jax.Array
    running: jax.Array
    step: jax.Array


def _inner(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(u * v, axis=0)


def _size(r: jax.Array) -> jax.Array:
    return jnp.linalg.norm(r, axis=0)


@jax.jit
def _begin(M: Callable, x: jax.Array, r: jax.Array, target: jax.Array, step: jax.Array) -> _State:
    z = M(r)
    scale = scale_of(z, 0)
    z = z / scale
    return _State(x, r, z, scale, _inner(r, z), _size(r) > target, step)


def _advance(A: KernelOperator, M: Callable, target: jax.Array, s: _State) -> _State:
    size = scale_of(s.p, 0)
    p = s.p / size
    q = A @ p
    curvature = _inner(p, q)
    running = s.running & (curvature > 0)  # rounding, where it is not
    alpha = jnp.where(running, s.rz / size[0] / jnp.where(running, curvature, 1), 0)[None]
    x, r = s.x + alpha * p, s.r - alpha * q
    z = M(r) / s.scale
    rz = _inner(r, z)
    beta = jnp.where(running, rz / jnp.where(running, s.rz, 1), 0)
    running = running & (_size(r) > target)
    return _State(x, r, z + beta[None] * s.p, s.scale, rz, running, s.step + 1)


@jax.jit
def _chunk(
    A: KernelOperator, M: Callable, state: _State, target: jax.Array, last: jax.Array
) -> tuple[_State, jax.Array]:
    """Take up to CHUNK steps; a column that is done stays, and so do all when none runs."""

    def step(s, _):
        s = jax.lax.cond(
            jnp.any(s.running) & (s.step < last),
            partial(_advance, A, M, target),
            lambda same: same,
            s,
        )
        return s, _size(s.r)

    return jax.lax.scan(step, state, length=CHUNK)


@jax.jit
def _residual(A: KernelOperator, b: jax.Array, x: jax.Array) -> jax.Array:
    return b - A @ x


def _same(v: jax.Array) -> jax.Array:
    return v


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
    b. Not under `jit`: it ends when it is done.

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
    checks.floating("b", b)
    b = jnp.asarray(b)
    if b.ndim not in (1, 2) or b.shape[0] != A.shape[0]:
        raise ValueError(
            f"`b` must have shape ({A.shape[0]},) or ({A.shape[0]}, B), got {b.shape}. "
            "Use y.reshape(-1) for values y (N, *out)."
        )
    checks.finite("b", b)
    within = float(jnp.finfo(A.dtype).eps) ** 0.5 if tolerance is None else tolerance
    checks.positive("tolerance", within)
    checks.whole("iterations", iterations, least=1)
    if not callable(preconditioner) and preconditioner is not None:
        raise TypeError(
            "`preconditioner` must be a function (n, B) -> (n, B), got "
            f"{type(preconditioner).__name__}. Use nystrom(key, A, rank=...)."
        )
    travels = isinstance(preconditioner, Nystrom | Partial)
    M = preconditioner if travels else Partial(preconditioner or _same)

    block = b.astype(A.dtype).reshape(b.shape[0], -1)
    order = scale_of(block, 0)
    block = block / order
    norms = np.asarray(_size(block))
    scale, target = np.where(norms == 0, 1, norms), jnp.asarray(within * norms, A.dtype)
    x, r, taken, converged = jnp.zeros_like(block), block, 0, False
    history = [norms / scale]
    for _ in range(1 + RESTARTS):
        before = history[-1].max()
        state = _begin(M, x, r, target, jnp.asarray(taken))
        while taken < iterations and bool(jnp.any(state.running)):
            state, sizes = _chunk(A, M, state, target, jnp.asarray(iterations))
            history += list(np.asarray(sizes)[: int(state.step) - taken] / scale)
            taken = int(state.step)
        x, r = state.x, _residual(A, block, state.x)
        history[-1] = np.asarray(_size(r)) / scale
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


@jax.jit
def _cholesky(square: jax.Array, jitter: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(square + jitter * jnp.eye(square.shape[0], dtype=square.dtype))


@jax.jit
def _factor(rows: jax.Array, lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turn rows C^T and R with R R^T = W into F with F^T F = C W^-1 C^T and orthogonal rows."""
    root = solve_triangular(lower, rows, lower=True)
    values, rotation = eigh(_dot(root, root.T))
    return _dot(rotation.T, root), jnp.maximum(values, 0)


def nystrom(key: jax.Array, A: KernelOperator, *, rank: int) -> Nystrom:
    """Make a preconditioner of random rows of a kernel.

    P = C W^-1 C^T + shift I, where C are the columns of the base at random examples and W is where
    they cross the rows of the same.

    Parameters
    ----------
    key : key
        Draws the examples, all alike.
    A : KernelOperator
        With a positive shift. For a kernel without a ridge, pass A + c with a small c; the result
        then serves A.
    rank : int
        Rows, in whole examples of `A.outputs` rows (rounded down).

    Returns
    -------
    Nystrom
        To pass to `solve`.

    Raises
    ------
    TypeError
        If A is no operator or the rank no whole number.
    ValueError
        If A is not symmetric and positive semi-definite or has no positive shift, the rank is
        smaller than the outputs of an example or larger than the operator, or the rows are not
        positive semi-definite even to rounding.

    Notes
    -----
    One computation of the rows (or a product with that many unit vectors, where the operator has no
    rows of its own), O(n rank^2) time and n rank numbers of memory; O(n rank) a product. Since
    C W^-1 C^T is never above the base, A is never below P: the spectrum of P^-1 A starts at 1.
    On the digits kernels, drawing rows in proportion to what is left of the diagonal (Chen,
    Epperly, Tropp, Webber 2024) or a larger shift of P on the complement (Frangella et al. 2023)
    needs as many steps, within 5 %.

    References
    ----------
    Williams and Seeger 2001; Frangella, Tropp, Udell 2023, section 5.
    """
    require_symmetric(A)
    checks.whole("rank", rank, least=A.outputs, cure="Use the rows of one example or more.")
    if rank > A.shape[0]:
        raise ValueError(
            f"`rank` must be at most the order of `A`, {A.shape[0]}, got {rank}. Use a sixth of it."
        )
    if checks.is_known(A.shift) and not A.shift > 0:
        raise ValueError(
            f"`A` must have a positive shift, got {A.shift}. Add a ridge: A + c, c > 0."
        )
    examples = jax.random.choice(key, A.shape[0] // A.outputs, (rank // A.outputs,), replace=False)
    at = (examples[:, None] * A.outputs + jnp.arange(A.outputs)[None]).reshape(-1)
    if A.rows is None:
        units = jnp.zeros((A.shape[0], at.size), A.dtype).at[at, jnp.arange(at.size)].set(1)
        rows = A.scale * A.product(units).T
    else:
        rows = A.scale * A.rows(examples).astype(A.dtype)
    square = rows[:, at]
    square = (square + square.T) / 2
    # as far as rounding goes, W may be indefinite; the smallest power of ten above that
    jitter = jnp.finfo(A.dtype).eps * jnp.trace(square) + jnp.finfo(A.dtype).tiny
    for _ in range(8):
        lower = _cholesky(square, jitter)
        if jnp.all(jnp.isfinite(lower)):
            factor, values = _factor(rows, lower)
            return Nystrom(factor, values, A.shift)
        jitter = 10 * jitter
    raise ValueError(
        "`A` must be positive semi-definite to rounding, got rows that are not. Compute the kernel "
        'at precision="highest"' + (", or in float64." if A.dtype != np.float64 else ".")
    )
