"""How an array in a model is laid out from one parameter leaf: what `walk` follows.

A view is the leaf itself, transposed, reshaped, sliced or spread, never changed in value but for a
constant factor. Its axes are made of atoms: digits of an axis of the leaf, so that a view may split
axes (d into heads and features of a head) and merge them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import JaxprEqn

from lazyjax.equations import lengths, settings


class Atom(NamedTuple):
    """The digit `(i // stride) % size` of index i of an axis, where it lies in [start, stop)."""

    axis: int
    stride: int
    size: int
    start: int
    stop: int
    flipped: bool = False  # runs backwards

    @property
    def length(self) -> int:
        """How many values it takes."""
        return self.stop - self.start

    @property
    def cut(self) -> bool:
        """Whether these are not all values of the digit."""
        return self.length < self.size


Axis = tuple[Atom, ...] | None
"""Atoms of an axis, the slowest first; () is an axis of length 1, None one that repeats."""


class View(NamedTuple):
    """A layout of a leaf."""

    leaf: int
    axes: tuple[Axis, ...]
    cuts: frozenset[Atom] = frozenset()  # of axes that were sliced to one element
    levels: tuple[Axis, ...] = ()  # for each scan around: the axis it runs over, None if constant
    factor: float = 1.0

    @property
    def spread(self) -> bool:
        """Whether it repeats its values."""
        return None in self.axes


def of_leaf(leaf: int, shape: tuple[int, ...]) -> View:
    """Give the view that is the leaf itself."""
    axes = tuple(() if n == 1 else (Atom(axis, 1, n, 0, n),) for axis, n in enumerate(shape))
    return View(leaf, axes)


def split(atoms: tuple[Atom, ...], lengths: tuple[int, ...]) -> tuple[Axis, ...] | None:
    """Deal atoms out to new axes of the given lengths; None if they do not fall on digits."""
    rest = list(atoms)
    axes = []
    for length in lengths:
        taken: list[Atom] = []
        while length > 1:
            if not rest:
                return None
            atom = rest.pop(0)
            if length % atom.length == 0:
                taken.append(atom)
                length //= atom.length
            elif atom.length % length == 0 and not atom.cut and not atom.flipped:
                minor = atom.size // length
                taken.append(Atom(atom.axis, atom.stride * minor, length, 0, length))
                rest.insert(0, Atom(atom.axis, atom.stride, minor, 0, minor))
                length = 1
            else:
                return None
        axes.append(tuple(taken))
    return None if rest else tuple(axes)


def _reshape(view: View, settings: Any, _: Any) -> View | None:
    if view.spread or settings.order is not None:
        return None
    atoms = tuple(atom for axis in view.axes if axis for atom in axis)
    axes = split(atoms, settings.shape)
    return None if axes is None else view._replace(axes=axes)


def _transpose(view: View, settings: Any, _: Any) -> View:
    return view._replace(axes=tuple(view.axes[i] for i in settings.order))


def _squeeze(view: View, settings: Any, _: Any) -> View:
    gone = settings.axes
    return view._replace(axes=tuple(a for i, a in enumerate(view.axes) if i not in gone))


def _broadcast(view: View, settings: Any, _: Any) -> View:
    axes: list[Axis] = [None if n > 1 else () for n in settings.shape]
    for here, there in enumerate(settings.axes):
        if view.axes[here] != ():
            axes[there] = view.axes[here]
    return view._replace(axes=tuple(axes))


def _slice(view: View, settings: Any, shape: tuple[int, ...]) -> View | None:
    if any(stride != 1 for stride in settings.strides or ()):
        return None
    axes, cuts = list(view.axes), set(view.cuts)
    for i, (start, stop) in enumerate(zip(settings.starts, settings.stops, strict=True)):
        axis = axes[i]
        if stop - start == shape[i]:
            continue
        if stop == start:
            return None
        if axis is None:
            axes[i] = None if stop - start > 1 else ()
        elif len(axis) == 1 and not axis[0].flipped:
            atom = axis[0]._replace(start=axis[0].start + start, stop=axis[0].start + stop)
            axes[i] = (atom,) if atom.length > 1 else ()
            cuts |= {atom} if atom.length == 1 else set()
        else:
            return None
    return view._replace(axes=tuple(axes), cuts=frozenset(cuts))


def _flip(view: View, settings: Any, _: Any) -> View:
    axes = [
        axis and tuple(atom._replace(flipped=not atom.flipped) for atom in axis)
        if i in settings.axes
        else axis
        for i, axis in enumerate(view.axes)
    ]
    return view._replace(axes=tuple(axes))


def _convert(view: View, settings: Any, _: Any) -> View | None:
    return view if jnp.issubdtype(settings.dtype, jnp.floating) else None


def _same(view: View, *_: Any) -> View:
    return view


LAYOUT: dict[str, Callable[[View, Any, tuple[int, ...]], View | None]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "rev": _flip,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "neg": lambda view, *_: view._replace(factor=-view.factor),
}
"""Primitives that only change a layout: `(view, settings, operand's shape) -> view or None`."""


def _constant(atom: Any) -> float | None:
    """Give the value of a literal number."""
    if isinstance(atom, core.Literal) and np.ndim(atom.val) == 0:
        return None if np.imag(atom.val) else float(np.real(atom.val))
    return None


def follow(equation: JaxprEqn, operand: int, view: View) -> View | None:
    """Give the view that an equation makes of a view; None if it is none.

    Parameters
    ----------
    equation : jaxpr equation
    operand : int
        Where the view enters.
    view : View

    Returns
    -------
    View or None
    """
    name = equation.primitive.name
    if name in LAYOUT and operand == 0:
        return LAYOUT[name](view, settings(equation), lengths(equation.invars[0]))
    if name in ("mul", "div") and (name == "mul" or operand == 0):
        number = _constant(equation.invars[1 - operand])
        if number:
            return view._replace(factor=view.factor * (number if name == "mul" else 1 / number))
    return None


POSITIONS = "positions"

Role = tuple[tuple[str, Atom], ...] | str
"""Atoms of the leaf and their kinds, "b" shared and "x" the factor's own; or positions."""


class Roles(NamedTuple):
    """What each axis of a factor is."""

    axes: tuple[Role, ...]

    def atoms(self, *kinds: str) -> list[Atom]:
        """Give the atoms of some kinds, of all axes."""
        every = [own for axis in self.axes if not isinstance(axis, str) for own in axis]
        return [atom for kind, atom in every if kind in kinds]


def in_order(roles: Roles) -> bool:
    """Tell whether the factor has the entries of the leaf in the order of the leaf."""
    atoms = roles.atoms("b", "x")
    places = [(atom.axis, -atom.stride) for atom in atoms]
    return places == sorted(places) and not any(atom.flipped for atom in atoms)


def arrange(array: Any, roles: Roles) -> Any:
    """Bring a factor to (shared, positions, own), its atoms in the order of the leaf.

    Parameters
    ----------
    array : (...)
        One axis for each entry of `roles`.
    roles : Roles

    Returns
    -------
    (B, S, X)
        B shared entries of the leaf, S positions, X entries of the leaf that are this factor's.
    """
    lengths: list[int] = []
    kinds: list[tuple[str, Any]] = []
    for length, axis in zip(array.shape, roles.axes, strict=True):
        if isinstance(axis, str):
            lengths.append(length)
            kinds.append(("s", len(kinds)))
        else:
            lengths += [atom.length for _, atom in axis]
            kinds += list(axis)
    array = array.reshape(lengths)
    flipped = [i for i, (kind, atom) in enumerate(kinds) if kind != "s" and atom.flipped]
    if flipped:
        array = (np if isinstance(array, np.ndarray) else jnp).flip(array, tuple(flipped))

    def place(i: int) -> tuple[Any, ...]:
        kind, atom = kinds[i]
        return (kind, atom) if kind == "s" else (kind, atom.axis, -atom.stride)

    order = sorted(range(len(kinds)), key=place)  # "b" < "s" < "x"
    sizes = {kind: 1 for kind in "bsx"}
    for i, (kind, _) in enumerate(kinds):
        sizes[kind] *= lengths[i]
    return array.transpose(order).reshape(sizes["b"], sizes["s"], sizes["x"])


def count(roles: Roles, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Give (B, S, X) of a factor of that shape."""
    b, x = (math.prod(atom.length for atom in roles.atoms(kind)) for kind in "bx")
    positions = (n for n, axis in zip(shape, roles.axes, strict=True) if axis == POSITIONS)
    return b, math.prod(positions), x


def covers(atoms: frozenset[Atom]) -> frozenset[Atom]:
    """Merge digits that follow one another: equal for two sets that stand for the same entries."""
    merged = {atom._replace(flipped=False) for atom in atoms}
    for low in sorted(merged, key=lambda atom: (atom.axis, atom.stride)):
        while low in merged and not low.cut:
            high = [a for a in merged if (a.axis, a.stride) == (low.axis, low.stride * low.size)]
            if not high or high[0].cut:
                break
            size = low.size * high[0].size
            merged -= {low, high[0]}
            low = Atom(low.axis, low.stride, size, 0, size)
            merged.add(low)
    return frozenset(merged)
