"""What a kernel costs, and why, before it is computed."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.source_info_util import summarize
from rich.console import Console
from rich.table import Table

from lazyjax.equations import Jaxpr, settings
from lazyjax.factors import RULES, Part, Plan, Shape, plan
from lazyjax.kernels.budgets import candidates, operations_of, peak
from lazyjax.kernels.computation import jobs, name_of
from lazyjax.kernels.methods import METHODS
from lazyjax.kernels.orders import ORDERS, cheapest_order, treatment
from lazyjax.kernels.request import Request, check
from lazyjax.kernels.task import Task
from lazyjax.meshes import in_any_program
from lazyjax.types import ModelFunction, Params, PyTree, Wrt, leaf_names


class Estimate(NamedTuple):
    """What one method needs for a kernel.

    Attributes
    ----------
    operations : float
        Multiply-adds, features and contraction.
    memory : int
        Bytes at the peak: parameters and inputs, temporaries and the kernel, as XLA counts them.
    """

    operations: float
    memory: int


@in_any_program()
def estimate(
    f: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    reduce: str = "none",
    wrt: Wrt | None = None,
    per_leaf: bool = False,
    outputs: Sequence[int] | None = None,
    batch_size: int | tuple[int, int] | None = None,
    precision: str = "highest",
) -> dict[str, Estimate]:
    """Predict what each method would need for `ntk` with the same arguments, without running it.

    Parameters
    ----------
    f, params, x1, x2, reduce, wrt, per_leaf, outputs, batch_size, precision
        As for `ntk`.

    Returns
    -------
    dict of Estimate
        By method, the one that `method="auto"` takes first. A model that has forward mode only
        (`while`) has no entry for the methods that need reverse mode.

    Raises
    ------
    TypeError, ValueError
        As `ntk`.

    Notes
    -----
    Operations are counted in the jaxpr. For the memory each method is compiled, which takes as
    long as the first call of `ntk` less its computation; a second call of `estimate` is free.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f = lambda w, x: jnp.tanh(x @ w)
    >>> list(estimate(f, jnp.ones((2, 3)), jnp.ones((4, 2))))[0]
    'structured_derivatives'
    """
    request = check(
        f,
        params,
        x1,
        x2,
        reduce=reduce,
        wrt=wrt,
        per_leaf=per_leaf,
        outputs=outputs,
        batch_size=batch_size,
        precision=precision,
    )
    each = {method.name: request.having(method=method.name) for method in candidates(request)}
    return {name: Estimate(operations_of(own), peak(own)) for name, own in each.items()}


class Leaf(NamedTuple):
    """How one leaf of the parameters is treated: a row of the table of `explain`."""

    name: str
    shape: tuple[int, ...]
    enters: str
    rule: str
    operations: float  # multiply-adds of the contraction, for a pair of examples
    where: str = ""  # the equations that it enters


def _uses(plan: Plan, part: Part, shape: Shape) -> str:
    places = [place for place, _ in (*part.straight, *part.swapped)]
    names = {_equation(plan.jaxpr.jaxpr, place).primitive.name for place in places}
    text = " and ".join(sorted(RULES[name].label for name in names))
    if len(places) > 1:
        text += f", {len(places)} times"
    if part.swapped:
        text += f", {len(part.swapped)} of them transposed"
    if shape.tokens:
        text += f", {shape.s} of {shape.tokens}"
    elif shape.s > len(places):
        text += f", {shape.s} positions"
    return text + (f", {shape.b} in parallel" if shape.b > 1 else "")


def _where(plan: Plan, part: Part) -> str:
    equations = [_equation(plan.jaxpr.jaxpr, place) for place, _ in (*part.straight, *part.swapped)]
    each = [f"{e.primitive.name} at {summarize(e.source_info)}" for e in equations]
    return ", ".join(dict.fromkeys(each))


def _equation(jaxpr: Jaxpr, place: tuple[int, ...]) -> Any:
    equation = jaxpr.eqns[place[0]]
    if len(place) == 1:
        return equation
    return _equation(settings(equation).body.jaxpr, place[1:])


def explanation(request: Request) -> list[Leaf]:
    """Give the rows of `explain`."""
    with request.options.in_force():
        return _explanation(request)


def _explanation(request: Request) -> list[Leaf]:
    rows: dict[str, Leaf] = {}
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(request.params)]
    leaves = list(zip(leaf_names(request.params), shapes, request.options.wrt, strict=True))
    named = [(name, shape) for name, shape, moves in leaves if moves]
    for job in jobs(request):
        itemsize = job.shape.dtype.itemsize
        task = job.task
        label = METHODS[name_of(job, request.x1, request.options.method)].label
        if not job.model.reverse:
            for leaf in range(len(named)):
                _add(rows, _plain(named[leaf], "forward mode only", label, task))
            continue
        planned = plan(
            job.model.jaxpr,
            len(job.model.w),
            lambda s, task=task, size=itemsize: treatment(cheapest_order(s, task, size)),
            apart=False,
        )
        for part, shape, kept in zip(
            planned.parts, planned.shapes, planned.treatments, strict=True
        ):
            order = ORDERS[kept.group]
            assert part.leaf is not None  # a bias is a part of its own only where leaves are apart
            own = Leaf(
                *named[part.leaf],
                enters=_uses(planned, part, shape),
                rule=order.label,
                operations=order.cost(shape, task.reduce).pair,
                where=_where(planned, part),
            )
            every = [own]
            if part.bias is not None:
                enters = "the bias of " + own.name
                share = float(shape.q if order.through_j else shape.b * shape.s**2)
                every.append(Leaf(*named[part.bias.leaf], enters, "as that", share, own.where))
            for row in every:
                if label:  # the method has no orders
                    plain = _plain((row.name, row.shape), row.enters, label, task)
                    row = plain._replace(where=row.where)
                _add(rows, row)
        for leaf, why in planned.structure.plain.items():
            _add(rows, _plain(named[leaf], why, label, task))
        for leaf in planned.structure.unused:
            _add(rows, Leaf(*named[leaf], "not at all", "zero", 0.0))
    for name, shape, moves in leaves:
        if not moves:
            _add(rows, Leaf(name, shape, "", "constant", 0.0))
    return list(rows.values())


def _plain(named: tuple[str, tuple[int, ...]], enters: str, label: str | None, task: Task) -> Leaf:
    """Give the row of a leaf whose Jacobian is multiplied as it is."""
    size = float(task.pairs * math.prod(named[1]))
    return Leaf(*named, enters, label or "plain Jacobian", size)


def _add(rows: dict[str, Leaf], row: Leaf) -> None:
    """Add a row, or join it to the one of the same leaf: another slice, or another output."""
    old = rows.get(row.name)
    if old is None:
        rows[row.name] = row
        return

    def both(one: str, other: str) -> str:
        return one if other in one.split("; ") else f"{one}; {other}"

    rows[row.name] = Leaf(
        row.name,
        row.shape,
        both(old.enters, row.enters),
        both(old.rule, row.rule),
        old.operations + row.operations,
        both(old.where, row.where),
    )


@in_any_program()
def explain(
    f: ModelFunction,
    params: Params,
    x: PyTree,
    *,
    reduce: str = "none",
    method: str = "auto",
    wrt: Wrt | None = None,
    outputs: Sequence[int] | None = None,
) -> None:
    """Print how each leaf of the parameters enters a model, and what `ntk` makes of it.

    Parameters
    ----------
    f, params, reduce, method, wrt, outputs
        As for `ntk`.
    x : array (N, ...) or pytree
        The batch of a kernel `ntk(f, params, x)`. Shapes alone matter.

    Raises
    ------
    TypeError, ValueError
        As `ntk`.

    Notes
    -----
    A leaf W that enters as `a W` at s positions, with d the derivative of the outputs by the
    product, has the kernel sum_st (a_s . a'_t) (d_s . d'_t). It is contracted by Grams, by the Gram
    of a applied to d, or through Jacobians, which are formed once or in slices; whatever enters in
    another way has its plain Jacobian. "share" is that of the multiply-adds of the contraction.
    Arrays that `f` holds itself are constants, such as the statistics of a batch norm in
    evaluation.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((2, 3)), "scale": jnp.ones((1, 3))}
    >>> f = lambda p, x: jnp.tanh(x @ p["w"]) * p["scale"]
    >>> explain(f, params, jnp.ones((4, 2)))  # doctest: +ELLIPSIS
    The kernel, leaf by leaf...
    ...
    """
    request = check(f, params, x, reduce=reduce, method=method, wrt=wrt, outputs=outputs)
    rows = explanation(request)
    whole = sum(row.operations for row in rows) or 1.0
    table = Table(title="The kernel, leaf by leaf", title_justify="left")
    for column in ("leaf", "shape", "enters by", "rule"):
        table.add_column(column)
    table.add_column("share", justify="right")
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "()"
        table.add_row(row.name, shape, row.enters, row.rule, f"{row.operations / whole:.0%}")
    console = Console()
    console.print(table)
    if jax.tree.leaves(request.f):
        console.print("Arrays that f holds itself are constants (batch statistics, for one).")
