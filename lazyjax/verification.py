"""Is this kernel right? Held against products with the Jacobian on random vectors.

For random u and v the kernel of each leaf must give u^T Theta v = <J1^T u, J2^T v>, and the whole
one Theta v = J1 (J2^T v). The right sides are two backward passes and a forward one on the batch as
it is: nothing of the kernel engine, no derivative of a single example, no Jacobian.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.derivatives import linearization
from lazyjax.equations import epsilon
from lazyjax.factors import require_reverse
from lazyjax.kernels import Request, check, explanation, jobs, kernels
from lazyjax.leaves import split
from lazyjax.meshes import in_any_program
from lazyjax.norms import scaled
from lazyjax.types import ModelFunction, Params, PyTree, Wrt, leaf_names
from lazyjax.widening import widened


class _Slack(NamedTuple):
    """What rounding is granted."""

    rounding: int  # epsilons by which two sums may differ
    step: int  # epsilons by which every weight is changed, to see what rounding does
    noise: int  # times what that changes


_SINGLE = _Slack(64, 4, 16)
_HALF = _Slack(8, 1, 1)  # few of whose operations are long sums: those are taken in float32


class Check(NamedTuple):
    """How far a kernel is from the products, and how far rounding may take it; relative."""

    error: float
    tolerance: float


class Verification(NamedTuple):
    """A kernel that agrees with products with the Jacobian.

    Attributes
    ----------
    whole : Check
        Of Theta v, over norm(Theta) norm(v); the largest over the output arrays.
    leaves : dict of Check
        By the path of the leaf, of u^T Theta v over norm(J1^T u) norm(J2^T v).
    """

    whole: Check
    leaves: dict[str, Check]


class WrongKernel(RuntimeError):
    """A kernel that does not agree with products with the Jacobian; `verification` says how far."""

    def __init__(self, message: str, verification: Verification):
        super().__init__(message)
        self.verification = verification


class _Products(NamedTuple):
    """What products with the Jacobian say, for the leaves l and the directions d of a probe."""

    forms: jax.Array  # (l, d), <J1^T u, J2^T v>
    left: jax.Array  # (l, d), norm(J1^T u)
    right: jax.Array  # (l, d), norm(J2^T v)
    pushed: jax.Array  # (d, N1, C), J1 (J2^T v)


def _directions(reduce: str, probe: jax.Array, outputs: int) -> jax.Array:
    """Give the vectors (d, n, C) that a probe (n, C) stands for: outputs mixed, added or apart."""
    if reduce == "none":
        return probe[None]
    each = jnp.eye(outputs, dtype=probe.dtype)[:, None] * probe[None, :, :1]
    if reduce == "diagonal":
        return each
    each = each / outputs**0.5
    return each if reduce == "trace" else jnp.sum(each, 0, keepdims=True)


def _inner(one: list[jax.Array], other: list[jax.Array]) -> jax.Array:
    """Multiply what belongs to the same leaf and direction, (d, ..) each: (l, d)."""
    sums = [jnp.sum(a * b, range(1, a.ndim)) for a, b in zip(one, other, strict=True)]
    return jnp.stack(sums)


@partial(jax.jit, static_argnames="leaf")
def _by_products(request: Request, u: jax.Array, v: jax.Array, *, leaf: int) -> _Products:
    w, rebuild = split(request.params, request.options.wrt)
    x1, x2 = request.x1, request.x1 if request.x2 is None else request.x2

    def of_batch(x: PyTree, w: list[jax.Array]) -> jax.Array:
        y = widened(jax.tree.leaves(request.f(rebuild(w), x))[leaf])
        y = y.reshape(y.shape[0], -1)
        return y if request.outputs is None else y[:, request.outputs]

    def pull(x: PyTree, probe: jax.Array) -> list[jax.Array]:
        y, pullback = jax.vjp(partial(of_batch, x), w)
        every = _directions(
            request.options.reduce, probe[:, : y.shape[1]].astype(y.dtype), y.shape[1]
        )
        return jax.vmap(lambda one: pullback(one)[0])(every)

    with request.options.in_force():
        left, right = pull(x1, u), pull(x2, v)
        _, push = linearization(partial(of_batch, x1), w)
        # XLA would join constants of both passes, and 1e-20 twice is 0 in float32
        pushed = jax.vmap(partial(scaled, push))(jax.lax.optimization_barrier(right))
    return _Products(
        forms=_inner(left, right),
        left=jnp.sqrt(_inner(left, left)),
        right=jnp.sqrt(_inner(right, right)),
        pushed=pushed,
    )


@jax.jit
def _whole_and_leaves(request: Request) -> Any:
    return kernels(request.having(per_leaf=False)), kernels(request.having(per_leaf=True))


def _flat(kernel: Any, reduce: str) -> np.ndarray:
    """Give a kernel as (n, m, ..), float64, its outputs flat."""
    kernel = np.asarray(kernel, np.float64)
    n, m, *out = kernel.shape
    if reduce == "none":
        return kernel.reshape(n, m, *(2 * (int(np.prod(out) ** 0.5 + 0.5),)))
    return kernel.reshape(n, m, -1)


def _form(kernel: np.ndarray, reduce: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute u^T K v, (d,) or (1,)."""
    if reduce == "none":
        return np.einsum("na,nmab,mb->", u, kernel, v)[None]
    return np.einsum("n,nmd,m->d", u[:, 0], kernel, v[:, 0])


def _image(kernel: np.ndarray, reduce: str, v: np.ndarray) -> np.ndarray:
    """Compute K v, (n, ..)."""
    if reduce == "none":
        return np.einsum("nmab,mb->na", kernel, v)
    return np.einsum("nmd,m->nd", kernel, v[:, 0])


def _pushed(products: _Products, reduce: str) -> np.ndarray:
    """Read K v off J1 (J2^T v)."""
    pushed = np.asarray(products.pushed, np.float64)  # (d, n, C)
    if reduce == "none":
        return pushed[0]
    outputs = pushed.shape[2]
    if reduce == "sum":
        return np.sum(pushed[0], 1, keepdims=True) / outputs**0.5
    own = np.einsum("dnd->nd", pushed)
    return own if reduce == "diagonal" else np.sum(own, 1, keepdims=True) / outputs**0.5


def _forms(products: _Products, reduce: str) -> tuple[np.ndarray, np.ndarray]:
    """Give the forms (l, d) and what they are relative to; the trace adds up its directions."""
    forms, left, right = (np.asarray(a, np.float64) for a in products[:3])
    if reduce != "trace":
        return forms, left * right
    sizes = [np.sqrt(np.sum(a**2, 1, keepdims=True)) for a in (left, right)]
    return np.sum(forms, 1, keepdims=True), sizes[0] * sizes[1]


def _largest(error: np.ndarray, allowed: np.ndarray, size: np.ndarray) -> Check:
    """Give the check that is nearest to its tolerance, or furthest above."""
    size = np.where(size > 0, size, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.argmax(np.nan_to_num(error / allowed, nan=np.inf))
    return Check(float((error / size).flat[worst]), float((allowed / size).flat[worst]))


def _perturbed(params: Params, rng: np.random.Generator, step: int) -> Params:
    """Change every float by so many units of its last place, up or down."""
    units = jax.tree.map(lambda leaf: rng.choice([-step, step], jnp.shape(leaf)), params)
    return _moved(params, units)


@jax.jit
def _moved(params: Params, units: Any) -> Params:
    def moved(leaf: Any, units: jax.Array) -> Any:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + leaf * units.astype(leaf.dtype) * jnp.finfo(leaf.dtype).eps

    return jax.tree.map(moved, params, units)


@in_any_program()
def verify(
    f: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    reduce: str = "none",
    method: str = "auto",
    wrt: Wrt | None = None,
    outputs: Sequence[int] | None = None,
    batch_size: int | tuple[int, int] | None = None,
    precision: str = "highest",
    seed: int = 0,
) -> Verification:
    """Check a kernel, whole and leaf by leaf, against products with the Jacobian.

    Theta v = J1 (J2^T v),  u^T Theta_leaf v = <J1^T u, J2^T v>_leaf,  u and v random

    Parameters
    ----------
    f, params, x1, x2, reduce, method, wrt, outputs, batch_size, precision
        As for `ntk`. A few examples will do: the kernel and one backward pass of the whole batch
        must fit in memory.
    seed : int
        Of the random vectors.

    Returns
    -------
    Verification
        The errors and the tolerances, relative.

    Raises
    ------
    TypeError
        As `ntk`; if the arguments are traced.
    ValueError
        As `ntk`; if f has no derivative in reverse mode.
    WrongKernel
        If they disagree. The message names the leaf, how it enters, its rule and the equations.

    Notes
    -----
    Cost: the kernel twice, whole and by leaves, and three products with it of one vector, that is
    four backward passes and two forward ones; K times that for "diagonal" and "trace". Each side is
    compiled once. The tolerance is 64 epsilon of the coarsest floats in the model, of the products
    or of their terms where these cancel, and 16 times what the products change when every weight is
    changed by 4 epsilon; in half precision 8 epsilon and what they change by 1. Two random vectors
    see any error above that, but for chance: one of size r times the tolerance is overlooked with a
    probability of the order of 1 / r. Products that are not finite tell nothing.

    Examples
    --------
    >>> f = lambda w, x: jnp.tanh(x @ w)
    >>> checked = verify(f, jnp.ones((2, 3)), jnp.ones((4, 2)))
    >>> checked.whole.error <= checked.whole.tolerance
    True
    """
    request = check(
        f,
        params,
        x1,
        x2,
        reduce=reduce,
        method=method,
        wrt=wrt,
        outputs=outputs,
        batch_size=batch_size,
        precision=precision,
    )
    return verified(request, seed=seed)


def verified(request: Request, *, seed: int = 0) -> Verification:
    """Check the kernel of a request, as `verify` does."""
    every = jobs(request)
    for job in every:
        require_reverse(job.model, "a check by products")
    whole, apart = _whole_and_leaves(request)
    each = zip(leaf_names(request.params), request.options.wrt, strict=True)
    names = [name for name, moves in each if moves]
    of_outputs = np.asarray(range(len(every) * len(names))).reshape(len(every), -1)
    apart = jax.tree.leaves(apart)
    checks = [
        _of_output(
            request, number, every[number].out, kernel, [apart[i] for i in of_outputs[number]], seed
        )
        for number, kernel in enumerate(jax.tree.leaves(whole))
    ]
    result = Verification(
        max((own for own, _ in checks), key=_excess),
        {name: max((own[i] for _, own in checks), key=_excess) for i, name in enumerate(names)},
    )
    wrong = [name for name, check in result.leaves.items() if _excess(check) > 1]
    if wrong or _excess(result.whole) > 1:
        raise WrongKernel(_message(request, result, wrong), result)
    return result


def _excess(check: Check) -> float:
    """Give the error over the tolerance; both are 0 where nothing depends on the parameters."""
    if check.error == 0 or np.isnan(check.tolerance):  # products that are not finite tell nothing
        return 0.0
    ratio = check.error / check.tolerance if check.tolerance > 0 else np.inf
    return ratio if np.isfinite(ratio) else np.inf


def _coarsest(request: Request) -> float:
    """Give the epsilon of the coarsest floats on the way, the parameters' own among them."""
    model = jax.make_jaxpr(lambda own: own.f(own.params, own.x1))(request)
    exact = request.options.precision in ("highest", "float32") or jax.default_backend() == "cpu"
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(request.params)}
    own = [float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max(epsilon(model.jaxpr), *own, 0.0 if exact else 2.0**-10)


def _of_output(
    request: Request, leaf: int, out: tuple[int, ...], kernel: Any, leaves: list[Any], seed: int
) -> tuple[Check, list[Check]]:
    """Check the kernel of one output array: the whole, and each leaf of the parameters."""
    reduce, rng = request.options.reduce, np.random.default_rng([seed, leaf])
    kernel, leaves = _flat(kernel, reduce), [_flat(own, reduce) for own in leaves]
    n, m, outputs = *kernel.shape[:2], math.prod(out)
    u, v = (rng.standard_normal((k, outputs)).astype(np.float32) for k in (n, m))
    plain = request.having(method="auto", batch_size=None)  # the same products for all of these
    eps = _coarsest(request)
    slack = _HALF if eps > float(jnp.finfo(jnp.float32).eps) else _SINGLE
    changed = replace(plain, params=_perturbed(request.params, rng, slack.step))
    here, near = (_by_products(own, u, v, leaf=leaf) for own in (plain, changed))

    image, pushed = _image(kernel, reduce, v.astype(float)), _pushed(here, reduce)
    size = float(np.linalg.norm(kernel) * np.linalg.norm(v)) or 1.0
    noise = np.linalg.norm(_pushed(near, reduce) - pushed) / size
    error = float(np.linalg.norm(image - pushed) / size)
    whole = Check(error, float(slack.rounding * eps + slack.noise * noise))

    (forms, sizes), (others, _) = _forms(here, reduce), _forms(near, reduce)
    of_kernel = np.stack([_form(own, reduce, u.astype(float), v.astype(float)) for own in leaves])
    # a form whose terms cancel has the rounding of its terms, u K v of each pair
    with np.errstate(over="ignore"):
        u2, v2 = u.astype(float) ** 2, v.astype(float) ** 2
        terms = np.sqrt(np.stack([_form(own**2, reduce, u2, v2) for own in leaves]))
    terms = np.where(np.isfinite(terms), terms, 0)  # what overflowed explains nothing
    # a derivative that cancels to 0 is rounding, of what stands beside it
    beside = eps**2 * np.linalg.norm(sizes, axis=0, keepdims=True)
    rounding = eps * np.maximum(sizes, terms) + beside
    allowed = slack.rounding * rounding + slack.noise * np.abs(others - forms)
    errors = np.abs(of_kernel - forms)
    return whole, [_largest(*own) for own in zip(errors, allowed, sizes, strict=True)]


def _message(request: Request, verification: Verification, wrong: list[str]) -> str:
    """Say which leaves are wrong, and how they were treated."""
    whole = verification.whole
    if not wrong:
        return (
            "the kernel of all leaves must be that of products with the Jacobian to "
            f"{whole.tolerance:.1e}, got {whole.error:.1e}, with every leaf right by itself. Use "
            "per_leaf=True and add up, or another `method`, and report this model."
        )
    rows = {row.name: row for row in explanation(request.of(request.x1))}
    texts = []
    for name in wrong:
        check, row = verification.leaves[name], rows[name]
        where = f" ({row.where})" if row.where else ""
        texts.append(
            f"`{name}` is off by {check.error:.1e}, where rounding explains "
            f"{check.tolerance:.1e}: it enters by {row.enters}{where}, rule: {row.rule}"
        )
    return (
        f"the kernel of each leaf must be that of products with the Jacobian, got: "
        f"{'; '.join(texts)}. Use method='ntk_vector_products', and report this model."
    )
