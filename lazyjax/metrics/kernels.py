"""How far kernels and outputs are from each other: changes, alignments, gaps."""

from typing import Any

import jax
import jax.numpy as jnp

from lazyjax import checks
from lazyjax.kernels import matrix
from lazyjax.metrics.sizes import floats, not_zero
from lazyjax.norms import norm, scale_of


def _same_shape(name: str, array: Any, other_name: str, other: Any) -> None:
    if jnp.shape(array) != jnp.shape(other):
        raise ValueError(
            f"`{name}` must have the shape of `{other_name}`, {jnp.shape(other)}, got "
            f"{jnp.shape(array)}. Compute both on the same points."
        )


def relative_kernel_change(kernel: jax.Array, kernel0: jax.Array) -> jax.Array:
    """Compute norm(K - K0)_F / norm(K0)_F.

    Parameters
    ----------
    kernel, kernel0 : arrays of one shape

    Returns
    -------
    () array

    Raises
    ------
    TypeError
        If they are operators.
    ValueError
        If the shapes differ, or `kernel0` is zero.
    """
    _no_operator("relative_kernel_change", "relative_change", kernel, kernel0)
    _same_shape("kernel", kernel, "kernel0", kernel0)
    kernel, kernel0 = floats((kernel, kernel0))
    size = not_zero("kernel0", norm(kernel0), "Compare with a kernel that is not zero.")
    return norm(kernel - kernel0) / size


def _centered(kernel: jax.Array) -> jax.Array:
    """Subtract the means of rows and columns, H K H with H = I - 1 1^T / M.

    The first row and column go before, which changes nothing but the rounding: what is constant
    leaves exactly zero.
    """
    rows = kernel - kernel[:1]
    rows = rows - jnp.mean(rows, axis=0, keepdims=True)
    rows = rows - rows[:, :1]
    return rows - jnp.mean(rows, axis=1, keepdims=True)


def _unit(name: str, kernel: jax.Array, centered: bool) -> jax.Array:
    """Divide a kernel by its Frobenius norm."""
    kernel = floats(kernel)
    size = not_zero(name, norm(kernel), "An alignment needs kernels and targets that are not.")
    kernel = kernel / size
    if not centered:
        return kernel
    kernel = _centered(kernel)
    size = norm(kernel)
    if checks.is_known(size) and size == 0:
        raise ValueError(
            f"`{name}` must not be constant over the points where it is centered, got zeros after "
            "centering. Use centered=False."
        )
    return kernel / size


def _no_operator(function: str, other: str, *kernels: Any) -> None:
    """Refuse operators, whose numbers are estimates."""
    for kernel in kernels:
        if not hasattr(kernel, "ndim"):
            raise TypeError(
                f"`{function}` must be given arrays, got {type(kernel).__name__}. Of operators use "
                f"lazyjax.operators.{other}(key, A, B), which estimates it by products."
            )


def kernel_alignment(a: jax.Array, b: jax.Array, *, centered: bool = False) -> jax.Array:
    """Compute the cosine of two kernels, <A, B>_F / (norm(A)_F norm(B)_F).

    Parameters
    ----------
    a, b : (N, N) or (N, N, *out, *out)
    centered : bool
        Centre both in feature space first.

    Returns
    -------
    () array
        From -1 to 1; from 0 for positive semi-definite kernels.

    Raises
    ------
    TypeError
        If they are operators.
    ValueError
        If the shapes differ, or a kernel is zero, for `centered` after centering.

    References
    ----------
    Cristianini, Shawe-Taylor, Elisseeff, Kandola 2001, "On kernel-target alignment"; centred:
    Cortes, Mohri, Rostamizadeh 2012, "Algorithms for learning kernels based on centered alignment".
    """
    _no_operator("kernel_alignment", "alignment", a, b)
    _same_shape("a", a, "b", b)
    return jnp.sum(_unit("a", matrix(a), centered) * _unit("b", matrix(b), centered))


def target_alignment(kernel: jax.Array, y: jax.Array, *, centered: bool = False) -> jax.Array:
    """Compute the alignment of a kernel with the targets, that is with y y^T.

    Parameters
    ----------
    kernel : (N, N) or (N, N, *out, *out)
        Real, or complex and Hermitian.
    y : (N, *out)
        An (N, N) kernel is held against sum_k y_k y_k^T; of complex targets y_k^T is conjugated.
    centered : bool
        Centre both in feature space first.

    Returns
    -------
    () array

    Raises
    ------
    ValueError
        If the shapes do not fit, or the kernel or y y^T is zero, for `centered` after centering.

    References
    ----------
    Cristianini et al. 2001.
    """
    square = matrix(kernel)
    columns = y.reshape(y.shape[0], -1) if kernel.ndim == 2 else y.reshape(-1, 1)
    if square.shape != (columns.shape[0],) * 2:
        raise ValueError(
            f"`y` must be the targets of the points of `kernel`, {kernel.shape}, got {y.shape}. "
            "Compute both on the same points."
        )
    columns = columns if jnp.iscomplexobj(columns) else floats(columns)
    columns = columns / scale_of(columns)
    with jax.default_matmul_precision("highest"):
        target = columns @ columns.conj().T
    if jnp.iscomplexobj(square) or jnp.iscomplexobj(target):
        square, target = square + 0j, target + 0j
    return jnp.sum(_unit("kernel", square, centered) * _unit("y", target, centered))


def tangent_gap(prediction: jax.Array, prediction_tangent: jax.Array) -> jax.Array:
    """Compute the rms difference of the outputs of a network and of its tangent model.

    Parameters
    ----------
    prediction, prediction_tangent : (N, *out)
        On the training points, or on a grid. Use `jax.vmap` for many times.

    Returns
    -------
    () array
        In the units of y.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    _same_shape("prediction", prediction, "prediction_tangent", prediction_tangent)
    prediction, prediction_tangent = floats((prediction, prediction_tangent))
    difference = prediction - prediction_tangent
    return norm(difference) / difference.size**0.5
