"""Lanczos' tridiagonalisation of an operator, from several starts at once."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.norms import eigh, norm
from lazyjax.operators.algebra import KernelOperator
from lazyjax.types import PyTree


class Tridiagonal(NamedTuple):
    """A Q = Q T + beta q e^T, one a start.

    Attributes
    ----------
    vectors : (B, depth, n)
        The rows are orthonormal.
    diagonal, off : (B, depth)
        Of T; the last of `off` is beta, what couples the space to the rest of the operator.
    """

    vectors: jax.Array
    diagonal: jax.Array
    off: jax.Array

    @property
    def matrix(self) -> jax.Array:
        """T (B, depth, depth)."""
        return _tridiagonal(self.diagonal, self.off[:, :-1])

    def eigh(self) -> tuple[jax.Array, jax.Array]:
        """Compute the eigenvalues (B, depth) of T, ascending, and its eigenvectors."""
        return eigh(self.matrix)


@jax.jit
def _tridiagonal(diagonal: jax.Array, off: jax.Array) -> jax.Array:
    return jax.vmap(lambda a, b: jnp.diag(a) + jnp.diag(b, 1) + jnp.diag(b, -1))(diagonal, off)


_lengths = jax.vmap(norm)


def _apart(Q: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Take from each of v (B, n) what rows of Q (B, m, n) hold of it; give that too, (B, m)."""
    held = jnp.einsum("bmn,bn->bm", Q, v, precision="highest")
    return v - jnp.einsum("bmn,bm->bn", Q, held, precision="highest"), held


def _fresh(key: jax.Array, Q: jax.Array, i: Any) -> jax.Array:
    """Draw a unit vector (B, n) that is orthogonal to all rows of Q."""
    v = jax.random.uniform(jax.random.fold_in(key, i), Q.shape[2:], Q.dtype, -1)

    def unit(_: Any, v: jax.Array) -> jax.Array:
        v, _ = _apart(Q, v)
        return v / _lengths(v)[:, None]

    # the second time for the rounding that the first has made longer
    return jax.lax.fori_loop(0, 2, unit, jnp.broadcast_to(v[None], Q[:, 0].shape))


@partial(jax.jit, static_argnames="depth")
def lanczos(
    A: KernelOperator,
    starts: jax.Array,
    *,
    depth: int,
    without: jax.Array | None = None,
    key: jax.Array | None = None,
) -> Tridiagonal:
    """Tridiagonalise a symmetric operator, with full reorthogonalisation.

    Parameters
    ----------
    A : KernelOperator
        Symmetric, (n, n).
    starts : (B, n)
    depth : int
        At most n, less m.
    without : (m, n), optional
        Orthonormal rows, apart from which everything is: A is projected onto the complement.
    key : key, optional
        Of the vectors that go on where a space ends; by default that of seed 0. With `without`,
        another than that which those were found with.

    Returns
    -------
    Tridiagonal

    Notes
    -----
    `depth` products with blocks (n, B), and B (depth + m) n numbers of memory. Where the Krylov
    space of a start ends before that, beta is 0 and a random vector goes on, so that T falls into
    blocks and every copy of a repeated eigenvalue can be found. Free of the operator's scale.

    References
    ----------
    Golub and Van Loan 2013, algorithm 10.1.1 and section 10.3 (reorthogonalisation).
    """
    count, n = starts.shape
    held = jnp.zeros((0, n), A.dtype) if without is None else without
    m, eps = len(held), jnp.finfo(A.dtype).eps
    key = jax.random.key(0) if key is None else key
    Q = jnp.zeros((count, m + depth, n), A.dtype).at[:, :m].set(held[None])

    def ended(w: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Give the lengths of w (B, n), 0 where they are rounding, and where they are."""
        lengths = _lengths(w)
        rounding = lengths <= eps * n**0.5 * largest
        return jnp.where(rounding, 0, lengths), rounding

    def step(i: Any, state: PyTree) -> Any:
        Q, w, lengths, diagonal, largest = state
        length, over = ended(w, largest)
        w = w / jnp.where(over, 1, length)[:, None]
        fresh = jax.lax.cond(jnp.any(over), partial(_fresh, key), lambda Q, i: Q[:, 0], Q, i)
        q = jnp.where(over[:, None], fresh, w)
        Q = Q.at[:, m + i].set(q)
        w, along = _apart(Q, (A @ q.T).T)
        w, _ = _apart(Q, w)
        largest = jnp.maximum(largest, jnp.max(jnp.abs(along), 1))
        diagonal = diagonal.at[:, i].set(along[:, m + i])
        return Q, w, lengths.at[:, i].set(length), diagonal, largest

    start = _apart(Q, starts)[0] if m else starts
    zeros = jnp.zeros((count, depth), A.dtype)
    state = Q, start, zeros, zeros, zeros[:, 0]
    Q, w, lengths, diagonal, largest = jax.lax.fori_loop(0, depth, step, state)
    last, _ = ended(w, largest)
    return Tridiagonal(Q[:, m:], diagonal, jnp.concatenate([lengths[:, 1:], last[:, None]], 1))
