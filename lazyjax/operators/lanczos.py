"""Lanczos' tridiagonalisation of an operator, from several starts at once."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from matfree import decomp

from lazyjax.operators.algebra import KernelOperator


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
        diagonal, off = jax.vmap(jnp.diag)(self.diagonal), self.off[:, :-1]
        return diagonal + jax.vmap(lambda b: jnp.diag(b, 1) + jnp.diag(b, -1))(off)


@custom_vmap
def _product(A: KernelOperator, v: jax.Array) -> jax.Array:
    return A @ v


@_product.def_vmap
def _(size, batched, A, v):
    return (A @ v.T).T, True  # one product with a block, which reads the kernel once


@partial(jax.jit, static_argnames="depth")
def lanczos(A: KernelOperator, starts: jax.Array, *, depth: int) -> Tridiagonal:
    """Tridiagonalise a symmetric operator, with full reorthogonalisation.

    Parameters
    ----------
    A : KernelOperator
        Symmetric, (n, n).
    starts : (B, n)
        Not zero.
    depth : int
        At most n.

    Returns
    -------
    Tridiagonal

    Notes
    -----
    `depth` products with blocks (n, B), and B depth n numbers of memory. Where the Krylov space of
    a start ends before that, beta is 0 to rounding, and what follows is orthogonal to it or 0.

    References
    ----------
    Golub and Van Loan 2013, algorithm 10.1.1; Kraemer et al. 2024 (matfree).
    """
    run = decomp.tridiag_sym(depth, materialize=False, reortho="full", custom_vjp=False)
    found = jax.vmap(lambda start: run(partial(_product, A), start))(starts)
    diagonal, off = map(jnp.asarray, found.J_small)
    off = jnp.concatenate([off, jnp.linalg.norm(found.residual, axis=1, keepdims=True)], axis=1)
    Q = jnp.asarray(found.Q_tall)
    # a space that has ended leaves rounding, or 0 / 0: vectors that need not be orthogonal to it
    gram = jnp.matmul(Q, jnp.swapaxes(Q, 1, 2), precision="highest")
    skew = jnp.max(jnp.abs(jnp.tril(gram - jnp.eye(depth, dtype=A.dtype)[None])), axis=2)
    orthonormal = skew <= jnp.finfo(A.dtype).eps ** (2 / 3)
    inside = jnp.cumprod(orthonormal, axis=1) == 1
    goes_on = jnp.concatenate([inside[:, 1:], inside[:, -1:]], axis=1)
    return Tridiagonal(
        vectors=jnp.where(inside[:, :, None], Q, 0),
        diagonal=jnp.where(inside, diagonal, 0),
        off=jnp.where(goes_on, off, 0),
    )
