"""A preconditioner of random rows of a kernel."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from lazyjax import checks
from lazyjax.norms import eigh
from lazyjax.operators.algebra import KernelOperator, require_symmetric, rows_at

TRIES = 8  # of a root of the rows where they cross

_dot = partial(jnp.matmul, precision="highest")


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


def _cholesky(square: jax.Array, jitter: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(square + jitter * jnp.eye(square.shape[0], dtype=square.dtype))


def _jitter(square: jax.Array) -> jax.Array:
    """Find what is to be added to the diagonal of a matrix that rounding may have made indefinite.

    The smallest power of ten above its rounding with which it has a root, of eight.
    """
    least = jnp.finfo(square.dtype).eps * jnp.trace(square) + jnp.finfo(square.dtype).tiny

    def fails(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        jitter, tried = state
        return (tried < TRIES - 1) & ~jnp.all(jnp.isfinite(_cholesky(square, jitter)))

    return jax.lax.while_loop(fails, lambda s: (10 * s[0], s[1] + 1), (least, 0 * least))[0]


@partial(jax.jit, static_argnames="outputs")
def _of_rows(rows: jax.Array, examples: jax.Array, shift: jax.Array, *, outputs: int) -> Nystrom:
    """Turn rows C^T and R with R R^T = W into F with F^T F = C W^-1 C^T and orthogonal rows."""
    square = rows[:, rows_at(examples, outputs)]
    square = (square + square.T) / 2
    jitter = _jitter(jax.lax.stop_gradient(square))
    root = solve_triangular(_cholesky(square, jitter), rows, lower=True)
    values, rotation = eigh(_dot(root, root.T))
    # jnp.maximum keeps what is not a number
    return Nystrom(_dot(rotation.T, root), jnp.maximum(values, 0), shift)


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

    It runs under `jit`, `vmap` and `scan`. Where the values of A are not known, nothing is raised
    about them: all numbers are NaN then, and so are the residuals of a solve.

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
    P = _of_rows(A.rows_of(examples), examples, A.shift, outputs=A.outputs)
    if checks.is_known(P) and not jnp.all(jnp.isfinite(P.values)):
        raise ValueError(
            "`A` must be positive semi-definite to rounding, got rows that are not. Compute the "
            'kernel at precision="highest"' + (", or in float64." if A.dtype != np.float64 else ".")
        )
    return P
