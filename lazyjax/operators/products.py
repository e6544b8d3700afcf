"""The empirical NTK as an operator, K v = J1 (J2^T v): within a budget, and on many devices."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.centering import pair_of_weights
from lazyjax.convolutions import plain_convolutions
from lazyjax.costs import rates
from lazyjax.kernels import Request, check, diagonals, kernels, matrix, only_output
from lazyjax.memory import bytes_needed, bytes_of, too_little
from lazyjax.meshes import in_any_program, zeros
from lazyjax.norms import scaled
from lazyjax.operators.algebra import KernelOperator, operator
from lazyjax.operators.jacobians import KEEPS, Setting, model_with
from lazyjax.operators.sampling import centered
from lazyjax.types import ModelFunction, Params, PyTree, Wrt

REDUCTIONS = ("none", "trace", "sum")
"""Those of `ntk` that are one matrix."""

_FASTEST = {False: ("residuals", "nothing"), True: ("features", "residuals", "nothing")}
_VECTORS = 64  # that are multiplied at once, at most


class Side(NamedTuple):
    """How the examples of one batch lie on the devices."""

    n: int
    local: int  # examples of a device; the last are copies where n does not divide


class Form(NamedTuple):
    """What is static about an operator."""

    setting: Setting
    outputs: int  # of an example, as products see them
    mean: int  # K, over which the reduction takes the mean; 1 for "none"
    left: Side
    right: Side
    symmetric: bool  # one batch
    at_once: int  # vectors
    dtype: np.dtype
    mesh: Mesh | None

    def swapped(self) -> "Form":
        """Give the form of the transposed operator."""
        return self._replace(left=self.right, right=self.left)


def _shared_out(form: Form, function: Any, *shared: bool) -> Any:
    """Let each device run a function on its share of the arguments that are shared out (axis 0)."""
    if form.mesh is None:
        return function
    here = PartitionSpec(form.mesh.axis_names)
    specs = tuple(here if own else PartitionSpec() for own in shared)
    return jax.shard_map(
        function, mesh=form.mesh, in_specs=specs[:-1], out_specs=specs[-1], check_vma=False
    )


def _pad(a: jax.Array, side: Side, mesh: Mesh | None, *, copies: bool) -> jax.Array:
    """Let each device have as many examples, the last ones copies or zeros."""
    missing = side.local * _devices(mesh) - side.n
    if not missing:
        return a
    return jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1), "edge" if copies else "constant")


def _devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.devices.size


@partial(jax.jit, static_argnames=("form", "right"))
def _prepared(request: Request, x: PyTree, *, form: Form, right: bool) -> Any:
    """Compute what is kept of one batch, with the devices on axis 0."""
    side = form.right if right else form.left

    def local(request: Request, x: PyTree) -> Any:
        return jax.tree.map(lambda a: a[None], KEEPS[form.setting.keep].prepare(request, x))

    x = jax.tree.map(lambda a: _pad(jnp.asarray(a), side, form.mesh, copies=True), x)
    with request.options.in_force():
        return _shared_out(form, local, False, True, True)(request, x)


@partial(jax.jit, static_argnames="form")
def _product(request: Request, kept: PyTree, other: Any, v: jax.Array, *, form: Form) -> jax.Array:
    """Multiply v (n C, V), or (n, V) for the trace: the left batch by the right one."""
    setting, mesh = form.setting, form.mesh
    tail = () if setting.chunk else (form.outputs,)
    vectors = v.T.reshape(v.shape[1], form.right.n, *tail)
    at_once = min(form.at_once, len(vectors))
    vectors = jnp.swapaxes(_pad(jnp.swapaxes(vectors, 0, 1), form.right, mesh, copies=False), 0, 1)

    @plain_convolutions  # products stand in loops, where these are ten times faster
    def local(every: tuple[Request, Any, Any, jax.Array]) -> jax.Array:
        request, kept, other, vectors = every
        kept, other = jax.tree.map(lambda a: a[0], (kept, other))
        maps = KEEPS[setting.keep].maps
        left = maps(request, kept, setting)
        right = left if form.symmetric else maps(request, other, setting)

        def through(c: jax.Array, start: Any) -> jax.Array:
            # XLA would join constants of both passes, and 1e-20 twice is 0 in float32
            u = jax.lax.optimization_barrier(scaled(lambda c: right.pull(c, start), c))
            u = u if mesh is None else jax.lax.psum(u, mesh.axis_names)
            return scaled(lambda u: left.push(u, start), u)

        def one(c: jax.Array) -> jax.Array:
            if not setting.chunk:
                return through(c, None)
            starts = jnp.arange(0, form.outputs, setting.chunk)
            if len(starts) == 1:
                return through(c, starts[0])
            return jnp.sum(jax.lax.map(partial(through, c), starts), 0)

        if mesh is not None:
            start = jax.lax.axis_index(mesh.axis_names) * form.right.local
            vectors = jax.lax.dynamic_slice_in_dim(vectors, start, form.right.local, 1)
        product = _in_turn(one, vectors, at_once)
        if mesh is not None:
            product = jax.lax.all_gather(product, mesh.axis_names, axis=1, tiled=True)
        return product

    with request.options.in_force():
        run = _shared_out(form, lambda *every: local(every), False, True, True, False, False)
        product = run(request, kept, other, vectors)
    product = product[:, : form.left.n] / form.mean
    return product.reshape(len(vectors), -1).T.astype(v.dtype)


def _in_turn(function: Any, vectors: jax.Array, at_once: int) -> jax.Array:
    """Apply a function to so many vectors after so many; the last are filled up with zeros."""
    count = len(vectors)
    if at_once >= count:
        return function(vectors)
    turns = -(-count // at_once)
    filled = zeros((turns * at_once, *vectors.shape[1:]), vectors).at[:count].set(vectors)
    results = jax.lax.map(function, filled.reshape(turns, at_once, *vectors.shape[1:]))
    return results.reshape(turns * at_once, *results.shape[2:])[:count]


class Product(NamedTuple):
    """A product as a static function of its arrays; equal ones compile once."""

    form: Form

    def __call__(self, request: Request, kept: PyTree, other: Any, v: jax.Array) -> jax.Array:
        """Multiply v."""
        return _product(request, kept, other, v, form=self.form)


def _rows(request: Request, examples: jax.Array) -> jax.Array:
    """Compute the rows of the kernel that belong to some examples of x1."""
    chosen = jax.tree.map(lambda a: jnp.asarray(a)[examples], request.x1)
    other = request.x1 if request.x2 is None else request.x2
    (kernel,) = jax.tree.leaves(kernels(request.of(chosen, other)))
    return matrix(kernel)


def _entries(request: Request) -> jax.Array:
    """Compute the diagonal."""
    reduce = request.options.reduce
    request = request.having(reduce="diagonal" if reduce == "none" else reduce)
    (own,) = jax.tree.leaves(diagonals(request))
    return own.reshape(-1)


def _form(
    request: Request, *, keep: str, block: int, outputs: int, dtype: np.dtype, mesh: Mesh | None
) -> Form:
    options, devices = request.options, _devices(mesh)

    def side(n: int) -> Side:
        local = -(-n // devices)
        return Side(n, -(-local // min(block, local)) * min(block, local))

    own = zip(jax.tree.leaves(request.params), options.wrt, strict=True)
    direction = dtype.itemsize * sum(np.size(w) for w, moves in own if moves)
    at_once = int(np.clip(rates().working // max(1, direction), 1, _VECTORS))
    chunk = max(c for c in range(1, outputs + 1) if outputs % c == 0 and c <= at_once)
    chunk = chunk if options.reduce == "trace" else 0
    return Form(
        setting=Setting(keep, block, chunk),
        outputs=1 if options.reduce == "sum" else outputs,
        mean=1 if options.reduce == "none" else outputs,
        left=side(request.n1),
        right=side(request.n2),
        symmetric=request.x2 is None,
        at_once=max(1, at_once // max(1, chunk)),
        dtype=dtype,
        mesh=mesh,
    )


def _of_one(request: Request) -> Request:
    """Give the request of one example: products need no more of them than their shapes."""
    return request.of(jax.tree.map(lambda a: jnp.asarray(a[:1]), request.x1))


def _peak(request: Request, form: Form) -> int:
    """Give the bytes at the peak of setting up and of one product, as XLA counts them."""
    one, x1 = _of_one(request), request.x1
    x2 = x1 if request.x2 is None else request.x2
    kept = jax.eval_shape(partial(_prepared, form=form, right=False), one, x1)
    other = jax.eval_shape(partial(_prepared, form=form, right=True), one, x2)
    size = form.right.n * (1 if request.options.reduce == "trace" else form.outputs)
    v = jax.ShapeDtypeStruct((size, 1), form.dtype)
    return max(
        bytes_needed(_prepared.lower(one, x1, form=form, right=False).compile()),
        bytes_needed(_product.lower(one, kept, other, v, form=form).compile()),
    )


def _fitting(request: Request, forms: list[Form], memory: int | float | str) -> Form:
    """Give the first form that keeps to a budget."""
    budget, least = bytes_of(memory), []
    for form in forms:
        least.append(_peak(request, form))
        if least[-1] <= budget:
            return form
    of = "products with this kernel, inputs included"
    raise too_little(min(least), of, memory, "fewer examples")


def _choose(request: Request, form: Any, keep: str, memory: Any) -> Form:
    """Choose what is kept, and how many examples are evaluated at once."""
    local = max(request.n1, request.n2)
    keeps = _FASTEST[request.options.reduce == "trace"] if keep == "auto" else (keep,)
    if memory is None:
        return form(keep=keeps[0], block=local)
    blocks = [-(-local // 2**i) for i in range(local.bit_length())]
    forms = [
        form(keep=name, block=block)
        for name in keeps
        for block in (blocks if name == "nothing" else blocks[:1])
    ]
    return _fitting(request, forms, memory)


@in_any_program(back=False)
def ntk_operator(
    f: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    reduce: str = "none",
    ridge: ArrayLike = 0.0,
    center: bool = False,
    weights: Any = None,
    keep: str = "auto",
    wrt: Wrt | None = None,
    outputs: Sequence[int] | None = None,
    memory: int | float | str | None = None,
    mesh: Mesh | None = None,
    precision: str = "highest",
) -> KernelOperator:
    """Give the empirical NTK as an operator, its entries never computed.

    K v = J(x1) (J(x2)^T v) + ridge v

    Parameters
    ----------
    f, params, x1, x2, wrt, outputs, precision
        As for `ntk`; f with one output array.
    reduce : str
        `"none"`, the kernel of all outputs, (N1 K, N2 K) as `matrix` has it; `"trace"` or `"sum"`,
        (N1, N2).
    ridge : float
        0 or more, in the units of the kernel; only with `x2=None`.
    center, weights
        As for `ntk`. The ridge is added afterwards.
    keep : str
        What is kept between two products: `"nothing"`, `"residuals"` of one linearization, or
        `"features"`, those of the kernel engine. `"auto"`: features for the trace, which reads them
        once for all outputs, and residuals otherwise; the next less where the budget has no room.
    memory : str or number of bytes, optional
        A budget like `"2GiB"`, for each device: parameters, inputs, what is kept, and the work of a
        product with one vector, as XLA counts them.
    mesh : jax.sharding.Mesh, optional
        Devices to share out the examples to, over all its axes; the sum J^T v is exchanged, and
        vectors are held whole on each.

    Returns
    -------
    KernelOperator
        Of the dtype of y.

    Raises
    ------
    TypeError
        As `ntk`, or if f has more than one output array.
    ValueError
        As `ntk`; if `reduce` or `keep` is unknown, f has no reverse mode, the ridge is negative or
        given with x2, or `memory` is too little: the message says what would do.

    Notes
    -----
    With F multiply-adds for one evaluation, a product takes about 5 F an example if nothing is kept
    and the batch is evaluated at once (6 F in blocks), and 4 F with residuals: 1.7 and 1.3
    gradients. Features take two products with them, without any derivative, and K times the memory
    of an evaluation. `"trace"` is K such products, but for features that are read once.

    References
    ----------
    Pearlmutter 1994, "Fast exact multiplication by the Hessian" (J u and J^T v as derivatives).
    Novak, Sohl-Dickstein, Schoenholz 2022, section 3.2 (NTK-vector products).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f = lambda w, x: jnp.tanh(x @ w)
    >>> K = ntk_operator(f, jnp.ones((2, 3)), jnp.ones((4, 2)), ridge=0.1)
    >>> K.shape, (K @ jnp.ones(12)).shape
    ((12, 12), (12,))
    """
    checks.one_of("reduce", reduce, REDUCTIONS)
    checks.one_of("keep", keep, ["auto", *KEEPS])
    checks.not_negative("ridge", ridge)
    request = check(
        f,
        params,
        x1,
        x2,
        reduce=reduce,
        wrt=wrt,
        outputs=outputs,
        precision=precision,
    )
    n2 = None if x2 is None else request.n2
    checks.flag("center", center)
    weights = None if weights is None else pair_of_weights(weights, request.n1, n2)
    unshifted = checks.is_known(ridge) and not np.any(ridge)
    if x2 is not None and not unshifted:
        raise ValueError(
            f"`ridge` must be 0 for the kernel of two batches, got {ridge}. Leave out `x2`."
        )
    out, dtype = only_output(request, "an operator")
    k = math.prod(out)
    if mesh is not None:
        mesh = Mesh(mesh.devices, mesh.axis_names)  # `jax.make_mesh` has explicit axes
        request = jax.device_put(request, NamedSharding(mesh, PartitionSpec()))
    one = _of_one(request)
    model_with(one)  # for models that it refuses
    form = partial(_form, request, outputs=k, dtype=dtype, mesh=mesh)
    chosen = _choose(request, form, keep, memory)
    left = _prepared(one, request.x1, form=chosen, right=False)
    right = left if x2 is None else _prepared(one, request.x2, form=chosen, right=True)
    kernel = operator(
        Partial(Product(chosen), one, left, right),
        Partial(Product(chosen.swapped()), one, right, left),
        rows=Partial(_rows, request),
        entries=Partial(_entries, request) if x2 is None else None,
        shape=(chosen.left.n * k // chosen.mean, chosen.right.n * k // chosen.mean),
        dtype=dtype,
        outputs=k // chosen.mean,
        psd=x2 is None,
    )
    if center or weights is not None:
        kernel = centered(kernel, center=center, weights=weights)
    return kernel if unshifted else kernel + ridge
