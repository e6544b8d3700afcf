"""Natural gradients through the kernel: a system of the size of the batch, not of the parameters.

With derivatives J, (J^T J + lambda I)^-1 J^T r = J^T (J J^T + lambda I)^-1 r: where there are more
parameters than examples the right side is the small one, and its matrix is a kernel.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lazyjax import centering, checks
from lazyjax.derivatives import jvp
from lazyjax.holomorphy import is_complex
from lazyjax.kernels import Request, check, kernel_and_pull, matrix, only_output
from lazyjax.leaves import split
from lazyjax.meshes import in_any_program
from lazyjax.traces import one_example
from lazyjax.types import ModelFunction, Params, PyTree, Wrt
from lazyjax.widening import widened


class _Numbers(NamedTuple):
    """What a step has beside the request, none of it static."""

    residual: jax.Array  # (N, *out)
    damping: ArrayLike
    momentum: ArrayLike | None
    previous: Params | None
    cutoff: ArrayLike | None


def _pulled(outputs: Any, w: Any, rows: jax.Array) -> Any:
    """Give J^H c, for J as `ntk` has it: by the parts of complex parameters, or by themselves."""
    y, pullback = jax.vjp(outputs, w)
    return jax.tree.map(jnp.conj, pullback(jnp.conj(rows).astype(y.dtype))[0])


def _solved(theta: jax.Array, r: jax.Array, numbers: _Numbers) -> jax.Array:
    """Solve (Theta + damping I) c = r, perhaps in the eigenvectors above the cut alone."""
    if numbers.cutoff is None:
        shifted = theta + numbers.damping * jnp.eye(len(theta), dtype=theta.dtype)
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(shifted, lower=True), r)
    values, vectors = jnp.linalg.eigh(theta)
    kept = values > numbers.cutoff * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values + numbers.damping, 1), 0)
    product = partial(jnp.matmul, precision="highest")
    return product(vectors, inverse * product(vectors.conj().T, r))


@jax.jit
def _step(request: Request, numbers: _Numbers) -> Params:
    center, weights = request.options.center, request.weights[0]
    w, rebuild = split(request.params, request.options.wrt)

    def outputs(w: Any) -> jax.Array:
        (y,) = jax.tree.leaves(widened(request.f(rebuild(w), request.x1)))
        return y.reshape(len(y), -1)

    def forth(rows: jax.Array) -> jax.Array:
        return centering.forth(rows, weights, center=center)

    def backwards(c: jax.Array) -> Any:
        rows = centering.back(c.reshape(request.n1, -1), weights, center=center)
        return _pulled(outputs, w, rows) if pull is None else pull(rows)

    with request.options.in_force():
        theta, pull = kernel_and_pull(request)
        theta = matrix(theta)
        right = forth(numbers.residual.reshape(request.n1, -1).astype(theta.dtype))
        before = None
        if numbers.momentum is not None:
            last = split(numbers.previous, request.options.wrt)[0]
            before = [(numbers.momentum * a).astype(b.dtype) for a, b in zip(last, w, strict=True)]
            right = right - forth(jvp(outputs, w, before)[1])
        update = backwards(_solved(theta, right.reshape(-1), numbers))
        if before is not None:
            update = optax.tree.add(update, before)
    zeros = jax.tree.map(jnp.zeros_like, request.params)
    return split(zeros, request.options.wrt)[1](update)


def _check(damping: Any, cutoff: Any, momentum: Any, previous: Any) -> None:
    if cutoff is None:
        checks.positive("damping", damping, "Use 0 only with a cutoff.")
    else:
        checks.not_negative("damping", damping)
        checks.not_negative("cutoff", cutoff)
    if momentum is None and previous is not None:
        raise ValueError(
            "`momentum` must be given with `previous`, got None. Use a number like 0.9, or leave "
            "out both."
        )
    if momentum is not None:
        if previous is None:
            raise ValueError(
                "`previous` must be given with `momentum`, got None. Pass the last update, at "
                "first zeros: optax.tree.zeros_like(params)."
            )
        checks.not_negative("momentum", momentum)


def _require_complex_leaves(request: Request) -> None:
    leaves = zip(jax.tree.leaves(request.params), request.options.wrt, strict=True)
    real = [jnp.result_type(leaf) for leaf, moves in leaves if moves and not is_complex(leaf)]
    if real:
        raise ValueError(
            "`params` must be complex for complex='hermitian', which gives complex updates, got "
            f"{real[0]}. Use complex='real', or leave real leaves out with `wrt`."
        )


@in_any_program()
def natural_gradient(
    f: ModelFunction,
    params: Params,
    x: PyTree,
    residual: ArrayLike,
    *,
    damping: ArrayLike,
    center: bool = False,
    weights: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    previous: Params | None = None,
    cutoff: ArrayLike | None = None,
    wrt: Wrt | None = None,
    precision: str = "highest",
    complex: str | None = None,
) -> Params:
    """Compute a damped natural gradient by the kernel of the batch.

    delta = (S + damping I)^-1 J^T W r = B^T (B B^T + damping I)^-1 sqrt(W) r,
    B = sqrt(W) J,  S = B^T B

    With `center`, J and r are J - mean J and r - mean r: stochastic reconfiguration, in the form
    of the small system.

    Parameters
    ----------
    f : ModelFunction
        With one output array, (N, *out): a network; of a quantum state the logarithm of its
        amplitude.
    params : pytree
    x : array (N, ...) or pytree
    residual : (N, *out)
        r, what the outputs are to lose: f(params, x) - y, or local energies. `center` takes the
        mean away.
    damping : float
        Above 0, or 0 with a cutoff. In the units of S: with the default weights those of a mean
        over the examples.
    center : bool
        Whether means over the examples are taken away.
    weights : (N,), optional
        W, 0 or more; by default 1/N each.
    momentum : float, optional
        mu: delta is then the nearest to mu `previous` that solves the same least squares (SPRING),
        delta = B^T (B B^T + damping I)^-1 (sqrt(W) r - mu B previous) + mu previous.
    previous : pytree like `params`, optional
        The last update; zeros at first.
    cutoff : float, optional
        Eigenvectors of B B^T whose eigenvalue is not above `cutoff` times the largest are left
        out; takes an eigendecomposition in the place of a Cholesky factorisation.
    wrt, precision
        As for `ntk`. What is not differentiated gets an update of 0.
    complex : str, optional
        As for `ntk`, for complex amplitudes. `"real"`: r and J in real and imaginary parts, a
        system of twice the size, for any parameters. `"hermitian"`: B^H in the place of B^T, for
        complex parameters in which f is holomorphic.

    Returns
    -------
    pytree like `params`
        delta, to be taken away: params - learning_rate * delta.

    Raises
    ------
    TypeError
        As `ntk`, or if f has more than one output array or the residual holds no floats.
    ValueError
        As `ntk`; if the residual has not the shape of f(params, x), parameters are real for
        `"hermitian"`, the damping is not positive,
        `cutoff` or `momentum` is negative, or only one of `momentum` and `previous` is given.

    Notes
    -----
    The kernel, a factorisation of N K x N K numbers, and one derivative of the batch; with
    momentum one more. Nothing of the size N x P is formed unless the kernel needs it. Runs under
    `jit` and `scan`, and with inputs that are sharded over a mesh.

    References
    ----------
    Sorella 1998 (stochastic reconfiguration). Chen and Heyl 2024, "Empowering deep neural quantum
    states through efficient optimization" (minSR). Goldshlager, Abrahamsen, Lin 2024, "A
    Kaczmarz-inspired approach to accelerate the optimization of neural network wavefunctions"
    (SPRING, equation 3.5).

    Examples
    --------
    >>> f = lambda w, x: x @ w
    >>> x, y = jnp.eye(2), jnp.ones((2, 1))
    >>> w = jnp.zeros((2, 1))
    >>> (w - natural_gradient(f, w, x, f(w, x) - y, damping=1e-6)).round(3)[:, 0].tolist()
    [1.0, 1.0]
    """
    _check(damping, cutoff, momentum, previous)
    if weights is None:
        n = checks.batch("x", x)
        weights = jnp.full(n, 1 / n)
    request = check(
        f,
        params,
        x,
        wrt=wrt,
        precision=precision,
        center=center,
        weights=weights,
        complex=complex,
    )
    out, dtype = only_output(request, "a natural gradient")
    residual = jnp.asarray(residual)
    (y,) = jax.tree.leaves(jax.eval_shape(f, params, one_example(x)))
    in_parts = complex == "real" and is_complex(y)
    want = (request.n1, *out[: -1 if in_parts else None])
    if complex is None or (complex == "real" and not in_parts):
        checks.floating("residual", residual)
    if complex == "hermitian":
        _require_complex_leaves(request)
    if residual.shape != want:
        raise ValueError(
            f"`residual` must have the shape of f(params, x), {want}, got "
            f"{residual.shape}. Pass one number for each output."
        )
    if in_parts:
        residual = jnp.stack([residual.real, residual.imag], -1)
    if previous is not None:
        checks.same_tree("previous", previous, params, "params")
    return _step(request, _Numbers(residual.astype(dtype), damping, momentum, previous, cutoff))


def scale_by_natural_gradient(
    f: ModelFunction,
    *,
    damping: ArrayLike,
    center: bool = False,
    momentum: ArrayLike | None = None,
    cutoff: ArrayLike | None = None,
    wrt: Wrt | None = None,
    precision: str = "highest",
    complex: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Give `natural_gradient` as a transformation of Optax.

    What comes in as gradients is not used: the direction follows from `x` and `residual`, extra
    arguments of `update`, and `weights` if they are given. The state is the last update.

    Parameters
    ----------
    f, damping, center, momentum, cutoff, wrt, precision, complex
        As in `natural_gradient`.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        To be followed by `optax.scale_by_learning_rate`.

    Raises
    ------
    TypeError, ValueError
        From `update`, as in `natural_gradient`, or if `params`, `x` or `residual` is missing.

    Examples
    --------
    >>> f = lambda w, x: x @ w
    >>> rule = scale_by_natural_gradient(f, damping=1e-6)
    >>> optimizer = optax.chain(rule, optax.scale_by_learning_rate(0.5))
    >>> w, x, y = jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1))
    >>> state = optimizer.init(w)
    >>> step, state = optimizer.update(w, state, w, x=x, residual=f(w, x) - y)
    >>> optax.apply_updates(w, step).round(3)[:, 0].tolist()
    [0.5, 0.5]
    """

    def init(params: Params) -> Any:
        return optax.EmptyState() if momentum is None else jax.tree.map(jnp.zeros_like, params)

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        x: PyTree = None,
        residual: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        **others: Any,
    ) -> tuple[Params, Any]:
        for name, value in (("params", params), ("x", x), ("residual", residual)):
            if value is None:
                raise ValueError(
                    f"`{name}` must be given to update, got None. Use "
                    "optimizer.update(gradients, state, params, x=x, residual=residual)."
                )
        delta = natural_gradient(
            f,
            params,
            x,
            residual if residual is not None else np.nan,
            damping=damping,
            center=center,
            weights=weights,
            momentum=momentum,
            previous=None if momentum is None else state,
            cutoff=cutoff,
            wrt=wrt,
            precision=precision,
            complex=complex,
        )
        return delta, state if momentum is None else delta

    return optax.GradientTransformationExtraArgs(init, update)
