"""How a parameter enters a product: one row of `RULES` for each primitive with structure.

In a product z = a W the derivative of output k by W is a sum over positions s of outer products,
J_k[b, p, q] = sum_s a[b, s, p] d_k[b, s, q], with d_k = dy_k / dz. A rule tells which axes of the
other operand and of z are the shared ones (b), the positions (s), and the leaf's own (p and q).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from lazyjax.convolutions import patches
from lazyjax.equations import lengths, settings
from lazyjax.factors.views import POSITIONS, Atom, Axis, Role, Roles, View, split


class Use(NamedTuple):
    """One place where a leaf enters a product."""

    view: View
    kept: int  # the operand whose value is kept, the other factor; -1 where it is 1 (a bias)
    prepare: Callable[[jax.Array], jax.Array]  # from that value to the factor's array
    a: Roles  # of the prepared array, its contracted axes the leaf's own ("x")
    d: Roles  # of the cotangent of the product
    tokens: int = 0  # > 0: the factor is whole numbers below this, short for one-hot vectors


def _axis(kind: str, atoms: Axis) -> tuple[tuple[str, Atom], ...]:
    return tuple((kind, atom) for atom in atoms or ())


def _same(value: jax.Array) -> jax.Array:
    return value


def _dot(equation: JaxprEqn, operand: int, view: View) -> Use | None:
    if view.spread:
        return None
    contracted, shared = settings(equation).numbers
    other = 1 - operand
    c_w, c_t = contracted[operand], contracted[other]
    b_w, b_t = shared[operand], shared[other]
    t_axes: list[Role] = [POSITIONS] * len(lengths(equation.invars[other]))
    for w, t in zip(c_w, c_t, strict=True):
        t_axes[t] = _axis("x", view.axes[w])
    for w, t in zip(b_w, b_t, strict=True):
        t_axes[t] = _axis("b", view.axes[w])
    free_w: list[Role] = [
        _axis("x", axis) for i, axis in enumerate(view.axes) if i not in (*c_w, *b_w)
    ]
    free_t: list[Role] = [POSITIONS] * (len(t_axes) - len(c_t) - len(b_t))
    sides = (free_w, free_t) if operand == 0 else (free_t, free_w)
    d_axes = [_axis("b", view.axes[w]) for w in b_w] + sides[0] + sides[1]
    return Use(view, other, _same, Roles(tuple(t_axes)), Roles(tuple(d_axes)))


def _convolution(equation: JaxprEqn, operand: int, view: View) -> Use | None:
    convolution = settings(equation)
    if operand != 1 or view.spread or convolution.batch_groups != 1:
        return None
    numbers, groups = convolution.numbers, convolution.groups
    out, into, *spatial = (view.axes[i] for i in numbers.rhs_spec)
    features = lengths(equation.invars[1])[numbers.rhs_spec[0]]
    grouped = split(out or (), (groups, features // groups))
    if grouped is None:
        return None
    window = tuple(lengths(equation.invars[1])[i] for i in numbers.rhs_spec[2:])
    inside = tuple(entry for axis in spatial for entry in _axis("x", axis))
    places = (POSITIONS,) * len(window)
    a = (POSITIONS, *places, inside, _axis("b", grouped[0]) + _axis("x", into))
    d: list[Role] = [POSITIONS] * (2 + len(window))
    for place, axis in zip(
        numbers.out_spec,
        (POSITIONS, _axis("b", grouped[0]) + _axis("x", grouped[1]), *places),
        strict=True,
    ):
        d[place] = axis
    # positions must run in one order in both: batch, then the places as the input has them
    if list(numbers.out_spec[2:]) != sorted(numbers.out_spec[2:]) or numbers.out_spec[0] > min(
        numbers.out_spec[2:], default=math.inf
    ):
        return None
    prepare = partial(patches, convolution=convolution, window=window)
    return Use(view, 0, prepare, Roles(a), Roles(tuple(d)))


def _tokens(indices: jax.Array, *, size: int, mode: str) -> jax.Array:
    index = indices[..., 0]
    if "FILL_OR_DROP" in mode:  # what is out of bounds has no gradient
        return jnp.where((index >= 0) & (index < size), index, -1)
    return jnp.clip(index, 0, size - 1)


def _gather(equation: JaxprEqn, operand: int, view: View) -> Use | None:
    lookup = settings(equation)
    numbers, mode = lookup.numbers, str(lookup.mode)
    shape = lengths(equation.invars[0])
    picked = numbers.start_index_map
    if operand or view.spread or len(picked) != 1 or numbers.operand_batching_dims:
        return None
    rest = tuple(n for i, n in enumerate(shape) if i != picked[0])
    slices = lookup.sizes
    whole = tuple(n for i, n in enumerate(slices) if i != picked[0]) == rest
    known = any(name in mode for name in ("FILL_OR_DROP", "CLIP", "PROMISE_IN_BOUNDS"))
    if not (whole and known and slices[picked[0]] == 1 and numbers.collapsed_slice_dims == picked):
        return None
    own = iter(_axis("x", axis) for i, axis in enumerate(view.axes) if i != picked[0])
    d = [
        next(own) if i in numbers.offset_dims else POSITIONS
        for i in range(len(lengths(equation.outvars[0])))
    ]
    positions = (POSITIONS,) * (len(lengths(equation.invars[1])) - 1)
    prepare = partial(_tokens, size=shape[picked[0]], mode=mode)
    atoms = _axis("x", view.axes[picked[0]])
    return Use(view, 1, prepare, Roles((*positions, atoms)), Roles(tuple(d)), shape[picked[0]])


class Rule(NamedTuple):
    """A row of `RULES`."""

    label: str  # in the table of `explain`
    # of a known equation, an operand and its view; None: not covered
    use: Callable[[JaxprEqn, int, View], Use | None]


RULES = {
    "dot_general": Rule("matrix product", _dot),
    "conv_general_dilated": Rule("convolution", _convolution),
    "gather": Rule("rows by index", _gather),
}
"""The primitives in which a parameter has a structured derivative."""
