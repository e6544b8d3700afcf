"""Which axes of an array are positions, and which are the width.

Axes of a network's arrays are cut and joined by reshapes, so each is a tuple of atoms: a flattened
feature map has one axis of three atoms, two of positions and one of the width. Atoms of length 1
are left out.
"""

import math
from typing import NamedTuple


class Atom(NamedTuple):
    """A part of an axis: positions, or channels that are taken as infinitely many."""

    length: int
    width: int | None = None  # the number of the width; None: positions


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def positions(axes: Axes) -> tuple[int, ...]:
    """Give the lengths of the atoms of positions, in order."""
    return tuple(atom.length for axis in axes for atom in axis if atom.width is None)


def channels(axes: Axes) -> int:
    """Give how many channels there are."""
    return math.prod(atom.length for axis in axes for atom in axis if atom.width is not None)


def widths(axes: Axes) -> set[int]:
    """Give the numbers of the widths."""
    return {atom.width for axis in axes for atom in axis if atom.width is not None}


def is_wide(axis: Axis) -> bool:
    """Tell whether channels run along an axis."""
    return any(atom.width is not None for atom in axis)


def of_positions(shape: tuple[int, ...]) -> Axes:
    """Give the axes of an array that has no width."""
    return tuple((Atom(n),) if n > 1 else () for n in shape)


def regroup(axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """Give the axes after a reshape; None where lengths do not divide each other."""
    atoms = [atom for axis in axes for atom in axis]
    new: list[Axis] = []
    for n in shape:
        axis: list[Atom] = []
        left = n
        while left > 1:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if left % atom.length == 0:
                axis.append(atom)
                left //= atom.length
            elif atom.length % left == 0:
                axis.append(atom._replace(length=left))
                atoms.insert(0, atom._replace(length=atom.length // left))
                left = 1
            else:
                return None
        new.append(tuple(axis))
    return tuple(new)


def refine(one: Axis, other: Axis) -> Axis | None:
    """Cut two axes of one length into the same atoms, those of the first where both are wide.

    None where positions of one are channels of the other.
    """
    left, right, new = list(one), list(other), []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if (a.width is None) != (b.width is None):
            return None
        small = min(a.length, b.length)
        if a.length % small or b.length % small:
            return None
        new.append(a._replace(length=small))
        for atom, rest in ((a, left), (b, right)):
            if atom.length > small:
                rest.insert(0, atom._replace(length=atom.length // small))
    return None if left or right else tuple(new)


def places_of(axes: Axes) -> list[list[int]]:
    """Give, of each axis, which of the positions of a field are its."""
    found, at = [], 0
    for axis in axes:
        count = sum(a.width is None for a in axis)
        found.append(list(range(at, at + count)))
        at += count
    return found
