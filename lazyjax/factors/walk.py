"""Where each parameter enters a model, found in its jaxpr; the model run with those places open.

`find` follows every leaf through what only changes its layout to the products that it enters.
A product is open when a zero is added to its output: the derivative of the model by that zero is
the cotangent d of the product, and the value of its other operand is the factor a.
"""

import math
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from lazyjax.equations import INLINE, Jaxpr, evaluate, known, lengths, needed, rescan, settings
from lazyjax.factors.rules import RULES, Use
from lazyjax.factors.views import (
    POSITIONS,
    Atom,
    Role,
    Roles,
    View,
    covers,
    follow,
    in_order,
    of_leaf,
)
from lazyjax.holomorphy import is_complex

Place = tuple[int, ...]
"""Numbers of an equation and of those around it, outermost first."""

_ALIKE = 1e6  # the ratio of two factors, and its inverse, that squares in float32 bear easily


class _Walk:
    """What one walk gathers."""

    def __init__(self) -> None:
        self.uses: dict[Place, list[Use]] = {}
        self.biases: dict[Place, View] = {}
        self.plain: dict[int, str] = {}
        self.seen: set[int] = set()


class Bias(NamedTuple):
    """A leaf that is added to a product, once for each position.

    It is what a further row of the weights would be whose input is `factor` over the factor of the
    product, at every position.
    """

    leaf: int
    factor: float
    view: View


def _is_bias(view: View, use: Use, shape: tuple[int, ...]) -> bool:
    """Tell whether a view that is added to a product, of that shape, is its bias.

    That is so if its entries are, one to one, those of the cotangent's own axes (b, q): along an
    axis of these it has all entries of whole digits, along positions it repeats, and each scan
    around runs over both or over neither. Numbers of very different size are no input of one row.
    """
    roles = use.d.axes[len(use.d.axes) - len(shape) :]
    if len(view.axes) != len(shape) or view.levels != use.view.levels or view.cuts:
        return False
    for axis, role, length in zip(view.axes, roles, shape, strict=True):
        own = not isinstance(role, str) and any(atom.length > 1 for _, atom in role)
        if (bool(axis) != own) or (axis and math.prod(a.length for a in axis) != length):
            return False
    if any(atom.cut or atom.flipped for axis in view.axes for atom in axis or ()):
        return False
    return 1 / _ALIKE < abs(view.factor / use.view.factor) < _ALIKE


def _walk(jaxpr: Jaxpr, views: list[View | None], walk: _Walk, here: Place) -> list[View | None]:
    """Follow the views that come in; give those that go out."""
    views_of: dict[Any, View] = {
        v: view for v, view in zip(jaxpr.invars, views, strict=True) if view is not None
    }
    consumers = Counter(
        v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal)
    ) + Counter(v for v in jaxpr.outvars if not isinstance(v, Literal))
    opened: dict[Any, Place] = {}  # the output of a product, and its place

    def view_of(atom: Any) -> View | None:
        return None if isinstance(atom, Literal) else views_of.get(atom)

    def only_added(equation: JaxprEqn, operand: int) -> Place | None:
        """Give the place of the product that an equation, and nothing else, reads to add to it."""
        if equation.primitive.name != "add":
            return None
        product = equation.invars[1 - operand]
        if isinstance(product, Literal):
            return None
        alone = consumers[product] == 1 and product.aval == equation.outvars[0].aval
        return opened.get(product) if alone else None

    for i, (equation, is_needed) in enumerate(zip(jaxpr.eqns, needed(jaxpr), strict=True)):
        entering = [(o, view) for o, v in enumerate(equation.invars) if (view := view_of(v))]
        if not entering or not is_needed:
            continue
        name, place = equation.primitive.name, (*here, i)
        if not known(equation):
            for _, view in entering:
                walk.seen.add(view.leaf)
                walk.plain.setdefault(view.leaf, f"{name} of this JAX")
            continue
        if name in INLINE:
            given = _walk(
                settings(equation).body.jaxpr, list(map(view_of, equation.invars)), walk, place
            )
            views_of |= {
                v: view for v, view in zip(equation.outvars, given, strict=True) if view is not None
            }
            continue
        if name == "scan":
            _walk_scan(equation, entering, walk, place)
            continue
        if len(entering) == 1 and (view := follow(equation, *entering[0])) is not None:
            views_of[equation.outvars[0]] = view
            continue
        for operand, view in entering:
            walk.seen.add(view.leaf)
            other = only_added(equation, operand) if len(entering) == 1 else None
            if (
                other is not None
                and other not in walk.biases
                and len(walk.uses[other]) == 1
                and _is_bias(view, walk.uses[other][0], lengths(equation.outvars[0]))
            ):
                walk.biases[other] = view
                continue
            use = RULES[name].use(equation, operand, view) if name in RULES else None
            if is_complex(equation.outvars[0].aval.dtype) != is_complex(
                equation.invars[operand].aval.dtype
            ):  # a real leaf in a complex product: its derivative is the real part of one
                use = None
            if use is None:
                walk.plain.setdefault(view.leaf, name)
            else:
                walk.uses.setdefault(place, []).append(_with_levels(use))
                opened[equation.outvars[0]] = place
    return [view_of(v) for v in jaxpr.outvars]


def _with_levels(use: Use) -> Use:
    """Add an axis for each scan around: one of the leaf where it runs over it, or positions."""
    outer: tuple[Role, ...] = tuple(
        POSITIONS if axis is None else tuple(("b", atom) for atom in axis)
        for axis in use.view.levels
    )
    return use._replace(a=Roles(outer + use.a.axes), d=Roles(outer + use.d.axes))


def _walk_scan(
    equation: JaxprEqn, entering: list[tuple[int, View]], walk: _Walk, place: Place
) -> None:
    scan = settings(equation)
    inside: list[View | None] = [None] * len(equation.invars)
    for operand, view in entering:
        if operand < scan.constants:
            inside[operand] = view._replace(levels=(*view.levels, None))
        elif operand < scan.constants + scan.carries or view.axes[0] is None:
            walk.seen.add(view.leaf)
            walk.plain.setdefault(view.leaf, "the carry of a scan")
        else:
            inside[operand] = view._replace(axes=view.axes[1:], levels=(*view.levels, view.axes[0]))
    for view in _walk(scan.body.jaxpr, inside, walk, place):
        if view is not None:
            walk.seen.add(view.leaf)
            walk.plain.setdefault(view.leaf, "what a scan gives")


def _kinds(roles: Roles, kind: str) -> frozenset[Atom]:
    return covers(frozenset(roles.atoms(kind)))


def signature(use: Use) -> tuple[frozenset[Atom], frozenset[Atom], frozenset[Atom]]:
    """Give what a use shares, what its factor a covers, and what its cotangent d covers."""
    return _kinds(use.a, "b"), _kinds(use.a, "x"), _kinds(use.d, "x")


def _cuts(use: Use) -> frozenset[Atom]:
    atoms = [atom for roles in (use.a, use.d) for atom in roles.atoms("b", "x")]
    return use.view.cuts | {atom._replace(flipped=False) for atom in atoms if atom.cut}


def _apart(one: frozenset[Atom], other: frozenset[Atom]) -> bool:
    """Tell whether two slices of a leaf have no entry in common."""
    return any(
        a[:3] == b[:3] and (a.stop <= b.start or b.stop <= a.start) for a in one for b in other
    )


class Part(NamedTuple):
    """The uses of a leaf, or of one slice of it, that have the same axes for a and for d."""

    leaf: int | None  # None: of the bias alone
    straight: tuple[tuple[Place, int], ...]  # place and number of the use
    swapped: tuple[tuple[Place, int], ...]  # where a covers what d does in the others
    bias: Bias | None
    tokens: int  # > 0: the factor a is whole numbers below this, short for one-hot vectors


def _parts_of_leaf(
    leaf: int, uses: dict[Place, list[Use]], biases: dict[Place, View]
) -> list[Part] | None:
    """Sort the uses of a leaf by slice; None where two of them overlap but do not agree."""
    slices: dict[frozenset[Atom], list[tuple[Place, int, Use]]] = {}
    for place, entries in uses.items():
        for number, use in enumerate(entries):
            if use.view.leaf == leaf:
                slices.setdefault(_cuts(use), []).append((place, number, use))
    names = list(slices)
    if any(not _apart(a, b) for i, a in enumerate(names) for b in names[:i]):
        return None
    parts = []
    for group in slices.values():
        shared, left, right = signature(group[0][2])
        straight, swapped = [], []
        for place, number, use in group:
            if signature(use) == (shared, left, right):
                straight.append((place, number))
            elif signature(use) == (shared, right, left):
                swapped.append((place, number))
            else:
                return None
        alone = len(group) == 1
        bias = biases.get(group[0][0]) if alone else None
        # where a table is stacked (shared), or its rows come in another order than the leaf has
        # them, its lookups are one-hot vectors like any other factor
        short = not shared and all(use.tokens and in_order(use.a) for _, _, use in group)
        tokens = group[0][2].tokens if short else 0
        if swapped and tokens:
            return None
        parts.append(
            Part(
                leaf,
                tuple(straight),
                tuple(swapped),
                Bias(bias.leaf, bias.factor, bias) if bias else None,
                tokens,
            )
        )
    return parts


def split_bias(part: Part) -> list[Part]:
    """Give the part of a product without its bias, and that of the bias alone."""
    if part.bias is None or part.leaf is None:
        return [part]
    return [part._replace(bias=None), part._replace(leaf=None)]


class Structure(NamedTuple):
    """How a model is differentiated: parts by their factors, the other leaves as they are."""

    uses: dict[Place, tuple[Use, ...]]
    parts: tuple[Part, ...]
    plain: dict[int, str]  # leaf -> why
    unused: tuple[int, ...]


def find(jaxpr: Jaxpr, leaves: int) -> Structure:
    """Find how each leaf enters a model.

    Parameters
    ----------
    jaxpr : Jaxpr
        Of `(*leaves, *x) -> y` on one example.
    leaves : int
        How many of its inputs are leaves of the parameters.

    Returns
    -------
    Structure
    """
    walk = _Walk()
    views: list[View | None] = [
        of_leaf(leaf, v.aval.shape) if leaf < leaves and v.aval.size else None
        for leaf, v in enumerate(jaxpr.invars)
    ]
    for view in _walk(jaxpr, views, walk, ()):
        if view is not None:
            walk.seen.add(view.leaf)
            walk.plain.setdefault(view.leaf, "the output")

    # a bias is one only where that is all it does, and its product is structured
    often = Counter(view.leaf for view in walk.biases.values())
    used = {use.view.leaf for uses in walk.uses.values() for use in uses}
    parts: list[Part] = []
    for leaf in sorted(used - set(walk.plain)):
        own = _parts_of_leaf(leaf, walk.uses, walk.biases)
        if own is None:
            walk.plain[leaf] = "products that do not agree"
        else:
            parts += own
    lonely = {leaf for leaf, n in often.items() if n > 1 or leaf in used or leaf in walk.plain}
    parts = [
        p._replace(bias=None) if p.bias and p.bias.leaf in lonely else p
        for p in parts
        if p.leaf not in walk.plain
    ]
    carried = {p.bias.leaf for p in parts if p.bias}
    for leaf in often:
        if leaf not in carried:
            walk.plain.setdefault(leaf, "add")
    parts = [p for p in parts if p.leaf not in walk.plain]
    places = {place for part in parts for place, _ in (*part.straight, *part.swapped)}
    return Structure(
        {place: tuple(walk.uses[place]) for place in sorted(places)},
        tuple(parts),
        walk.plain,
        tuple(leaf for leaf in range(leaves) if leaf not in walk.seen),
    )


def zeros(jaxpr: Jaxpr, places: set[Place], here: Place = ()) -> dict[Place, jax.Array]:
    """Give a zero for the output of each open product, stacked for each scan around it."""
    values = {}
    for i, equation in enumerate(jaxpr.eqns):
        place = (*here, i)
        if place in places:
            aval = equation.outvars[0].aval
            values[place] = jnp.zeros(aval.shape, aval.dtype)
        elif any(p[: len(place)] == place for p in places):
            inside = zeros(settings(equation).body.jaxpr, places, place)
            if equation.primitive.name == "scan":
                length = settings(equation).length
                inside = {p: jnp.zeros((length, *z.shape), z.dtype) for p, z in inside.items()}
            values |= inside
    return values


def run(
    closed: Any,
    arguments: Any,
    added: dict[Place, jax.Array],
    *,
    uses: dict[Place, tuple[Use, ...]],
    here: Place = (),
) -> tuple[list[Any], dict[Place, tuple[Any, ...]]]:
    """Evaluate a jaxpr with its products open.

    Parameters
    ----------
    closed : ClosedJaxpr
    arguments : list
        What to evaluate.
    added : dict
        What is added to the output of each open product, as from `zeros`.
    uses : dict
        From `find`.

    Returns
    -------
    outputs : list
    kept : dict
        For each open product, the values of the other factor of each of its uses.
    """
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    kept: dict[Place, tuple[Any, ...]] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for i, (equation, is_needed) in enumerate(zip(jaxpr.eqns, needed(jaxpr), strict=True)):
        if not is_needed:
            continue
        place = (*here, i)
        inside = {p: u for p, u in uses.items() if p[: len(place)] == place}
        if place in inside:
            (out,) = evaluate(jaxpr, equation, read)
            out = [out + added[place]]
            kept[place] = tuple(read(equation.invars[use.kept]) for use in inside[place])
        elif inside:
            body = partial(run, uses=inside, here=place)
            inputs = list(map(read, equation.invars))
            mine = {p: added[p] for p in inside}
            if equation.primitive.name == "scan":
                out, more = rescan(equation, inputs, body, mine)
            else:
                out, more = body(settings(equation).body, inputs, mine)
            kept |= more
        else:
            out = evaluate(jaxpr, equation, read)
        values |= dict(zip(equation.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars], kept
