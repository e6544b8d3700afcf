"""What is kept of each leaf, planned for a model, and computed for a batch: the features.

Of a leaf that enters products these are the two factors of its Jacobian, or that Jacobian; leaves
that enter in another way have their plain one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.convolutions import one_by_one
from lazyjax.equations import Jaxpr
from lazyjax.factors.model import by_directions, dtype_of, times
from lazyjax.factors.pair import (
    Factors,
    Shape,
    bias_jacobian,
    bias_of,
    factors,
    jacobian_of,
    shape_of,
    side_by_side,
)
from lazyjax.factors.walk import Part, Structure, find, run, signature, split_bias, zeros
from lazyjax.meshes import alike
from lazyjax.types import PyTree

_SMALL = 4096  # numbers of a leaf, up to which Jacobians are joined to one


class Treatment(NamedTuple):
    """What is kept of a part."""

    group: str  # of the features that it is among; in "jacobian" its Jacobian is kept
    through_j: bool  # it is used as a Jacobian: the bias has its own, and factors keep their scale

    @property
    def formed(self) -> bool:
        """Whether the Jacobian is kept, not its factors."""
        return self.group == "jacobian"


JACOBIAN = Treatment("jacobian", True)
FACTORS = Treatment("factors", False)


class Plan(NamedTuple):
    """What is kept of each leaf, for one model."""

    jaxpr: Jaxpr
    structure: Structure
    parts: tuple[Part, ...]
    shapes: tuple[Shape, ...]  # of the parts
    treatments: tuple[Treatment, ...]
    plain: tuple[int, ...]
    apart: bool  # leaves are kept apart

    def alike(self, i: int) -> list[int]:
        """Give the parts that are contracted as one with part i: of the same sizes and group."""
        if self.apart or self.shapes[i].tokens:
            return [i]
        every = list(zip(self.shapes, self.treatments, strict=True))
        return [j for j, other in enumerate(every) if other == every[i]]


def plan(
    jaxpr: Jaxpr,
    leaves: int,
    choose: Callable[[Shape], Treatment],
    *,
    apart: bool,
    plainly: tuple[int, ...] = (),
) -> Plan:
    """Find the structure of a model and choose what is kept of each part.

    Parameters
    ----------
    jaxpr : ClosedJaxpr
        From `trace`.
    leaves : int
        How many of its inputs are leaves of the parameters.
    choose : callable
        From the sizes of a part to what is kept of it.
    apart : bool
        Whether leaves are kept apart. Otherwise all Jacobians are one array, and a bias goes with
        its product.
    plainly : tuple of int
        Leaves that have their plain Jacobian whatever they enter.

    Returns
    -------
    Plan
    """
    structure = find(jaxpr.jaxpr, leaves)
    parts = structure.parts
    if apart or plainly:
        parts = tuple(piece for part in parts for piece in split_bias(part))
    also_plain = {leaf_of(part) for part in parts} & set(plainly)
    parts = tuple(part for part in parts if leaf_of(part) not in also_plain)
    avals = jax.eval_shape(lambda: zeros(jaxpr.jaxpr, set(structure.uses)))
    outputs = jaxpr.out_avals[0].shape[0]
    shapes = tuple(shape_of(part, structure, avals, outputs) for part in parts)
    treatments = tuple(choose(shape) for shape in shapes)
    plain = sorted({*structure.plain, *also_plain})
    if not parts and not plain:  # features have a batch: a Jacobian of zeros, the smallest
        plain = [min(range(leaves), key=lambda leaf: jaxpr.in_avals[leaf].size)]
    return Plan(jaxpr, structure, parts, shapes, treatments, tuple(plain), apart)


Features = dict[str, Any]
"""Of a batch, batch on axis 0: {group: {part: factors}} and {"jacobian": {leaf: (n, k, P)}}.

Where leaves are not apart, the Jacobians are numbered."""


def leaf_of(part: Part) -> int:
    """Give the leaf that a part is of."""
    return bias_of(part).leaf if part.leaf is None else part.leaf


def covered(plan: Plan, i: int) -> Any:
    """Say which entries of its leaf the factors of a part cover, in which way.

    Parts of two models for which this is equal have Jacobians in the same order, and may be
    contracted with each other.
    """
    part, shape = plan.parts[i], plan.shapes[i]
    place, number = part.straight[0]
    own = signature(plan.structure.uses[place][number])
    return part.leaf is None, own, part.tokens, shape.b, shape.p, shape.q


def members(lengths: dict[int, list[int]], *, apart: bool) -> dict[int, list[tuple[int, int]]]:
    """Say which Jacobians, of these lengths P, are joined to one: leaf, and number of its own."""
    if apart:
        return {leaf: [(leaf, i) for i in range(len(own))] for leaf, own in lengths.items()}
    every = [(leaf, i) for leaf, own in lengths.items() for i in range(len(own))]
    small = [(leaf, i) for leaf, i in every if lengths[leaf][i] <= _SMALL]
    large = [[(leaf, i)] for leaf, i in every if lengths[leaf][i] > _SMALL]
    return dict(enumerate([*([small] if small else []), *reversed(large)]))


def join(jacobians: dict[int, list[jax.Array]], *, apart: bool) -> dict[int, jax.Array]:
    """Join Jacobians (k, P): those of each leaf, or all small ones to one."""
    lengths = {leaf: [j.shape[-1] for j in own] for leaf, own in jacobians.items()}
    return {
        key: jnp.concatenate([jacobians[leaf][i] for leaf, i in every], -1)
        for key, every in members(lengths, apart=apart).items()
    }


def _times(own: Factors, part: Part, roots: tuple[jax.Array, ...]) -> Factors:
    """Multiply the derivatives by a leaf, and those by its bias, by a number each."""
    root = roots[leaf_of(part)]
    ratio = roots[bias_of(part).leaf] / root if own.bias is not None else None
    return own._replace(
        d=own.d * root,
        d_swapped=None if own.d_swapped is None else own.d_swapped * root,
        bias=None if own.bias is None else own.bias * ratio,
    )


def features(plan: Plan, w: Any, x: PyTree, roots: tuple[jax.Array, ...] | None = None) -> Features:
    """Compute what is kept of a batch.

    Parameters
    ----------
    plan : Plan
    w : list of arrays
    x : pytree, batch on axis 0
    roots : tuple of arrays, optional
        What the derivatives by each leaf are multiplied by: a number, or of a leaf that the plan
        has plainly an array of its shape.

    Returns
    -------
    dict
    """
    structure, jaxpr = plan.structure, plan.jaxpr
    dtype = dtype_of(jaxpr, w)
    examples = one_by_one(jaxpr.jaxpr)

    def of_one(x: PyTree) -> Features:
        def model(added: Any, plain: Any) -> Any:
            leaves = list(w)
            for leaf, value in zip(plan.plain, plain, strict=True):
                leaves[leaf] = value
            inputs = [*leaves, *jax.tree.leaves(x)]
            (y,), kept = run(jaxpr, inputs, added, uses=structure.uses)
            return y, kept

        added = alike(zeros(jaxpr.jaxpr, set(structure.uses)), (w, x))
        y, pullback, kept = jax.vjp(
            examples.model(model), added, [w[i] for i in plan.plain], has_aux=True
        )
        d, plain = by_directions(pullback, y)
        if roots is not None:
            plain = [times(j, roots[leaf]) for leaf, j in zip(plan.plain, plain, strict=True)]
        rest = {
            leaf: [j.astype(dtype).reshape(y.size, -1)]
            for leaf, j in zip(plan.plain, plain, strict=True)
        }
        gathered: dict[int, list[Factors]] = {}
        for i, (part, shape, treatment) in enumerate(
            zip(plan.parts, plan.shapes, plan.treatments, strict=True)
        ):
            balanced = not treatment.through_j
            own = factors(part, structure.uses, kept, d, dtype, balanced=balanced)
            own = own if roots is None else _times(own, part, roots)
            if treatment.through_j and shape.bias:
                bias = bias_jacobian(own.d, own.bias)
                rest.setdefault(bias_of(part).leaf, []).append(bias)
                own = own._replace(bias=None)
            if treatment.formed:
                rest.setdefault(leaf_of(part), []).append(jacobian_of(own, shape))
            else:
                gathered.setdefault(plan.alike(i)[0], []).append(own)
        groups: Features = {}
        for i, every in gathered.items():
            groups.setdefault(plan.treatments[i].group, {})[i] = side_by_side(every)
        if rest:
            groups["jacobian"] = join(rest, apart=plan.apart)
        return groups

    return examples.each(of_one, x)
