"""A view says which entries of a leaf an array has: by hand, digit by digit, beside the array."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lazyjax.factors.views import POSITIONS, Atom, arrange, count, covers, follow, of_leaf, split
from lazyjax.factors.views import Roles as RolesOfAxes


def view_of(function, shape):
    """Follow a leaf through the equations of a function of it alone; None where it is lost."""
    jaxpr = jax.make_jaxpr(function)(jnp.zeros(shape)).jaxpr
    variable, view = jaxpr.invars[0], of_leaf(0, shape)
    for equation in jaxpr.eqns:  # a chain
        (operand,) = [i for i, v in enumerate(equation.invars) if v is variable]
        view, variable = follow(equation, operand, view), equation.outvars[0]
        if view is None:
            return None
    return view


def entries(view, shape):
    """Give the values of a view of a leaf whose entries are their own numbers."""
    leaf = np.arange(1.0, math.prod(shape) + 1).reshape(shape)
    sizes = [1 if axis is None else math.prod(a.length for a in axis) for axis in view.axes]
    found = np.empty(sizes)
    for place in itertools.product(*map(range, sizes)):
        index = [0] * len(shape)
        for atom in view.cuts:
            index[atom.axis] += atom.start * atom.stride
        for axis, number in zip(view.axes, place, strict=True):
            for atom in reversed(axis or ()):
                number, digit = divmod(number, atom.length)
                digit = atom.length - 1 - digit if atom.flipped else digit
                index[atom.axis] += (atom.start + digit) * atom.stride
        found[place] = view.factor * leaf[tuple(index)]
    return found


VIEWS = {
    "itself": (lambda w: 1.0 * w, (2, 3)),
    "transposed": (lambda w: w.T, (2, 3)),
    "split in two": (lambda w: w.reshape(2, 3, 4), (6, 4)),
    "split, moved and merged": (lambda w: w.reshape(2, 3, 4).transpose(1, 0, 2), (6, 4)),
    "merged": (lambda w: w.reshape(24), (2, 3, 4)),
    "an axis of length one": (lambda w: w[:, 0], (4, 1)),
    "with a new axis": (lambda w: w[None, :, None], (5,)),
    "repeated": (lambda w: jnp.broadcast_to(w, (4, 3)), (3,)),
    "a slice": (lambda w: w[1:3], (5, 2)),
    "one row": (lambda w: w[2], (5, 2)),
    "a slice of a slice": (lambda w: w[1:4][1:3], (5, 2)),
    "a column of a transpose": (lambda w: w.T[1], (5, 2)),
    "flipped": (lambda w: lax.rev(w, (0,)), (4, 2)),
    "split and flipped": (lambda w: lax.rev(w.reshape(2, 3, 2), (1,)), (6, 2)),
    "negative": (lambda w: -w, (2, 2)),
    "times and over": (lambda w: 0.5 * w / 4, (2, 2)),
    "a constant before": (lambda w: (3 * w).T, (2, 3)),
    "named for a remat": (lambda w: checkpoint_name(w, "w"), (2, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_has_the_entries_of_the_array(name):
    function, shape = VIEWS[name]
    view = view_of(function, shape)
    expected = np.asarray(function(jnp.arange(1.0, math.prod(shape) + 1).reshape(shape)))
    found = entries(view, shape)
    assert len(view.axes) == expected.ndim
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


LOST = {
    "a sum": lambda w: w + 1.0,
    "every second row": lambda w: lax.slice(w, (0, 0), (6, 4), (2, 1)),
    "a power": lambda w: w**2,
    "times zero": lambda w: 0.0 * w,
    "one over it": lambda w: 1.0 / w,
    "whole numbers": lambda w: w.astype(int),
    "rows that do not fall on digits": lambda w: w.T.reshape(6, 4),
    "reshaped after a repetition": lambda w: jnp.broadcast_to(w, (2, 6, 4)).reshape(12, 4),
    "split after a slice": lambda w: w[1:5].reshape(2, 2, 4),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_no_view_is_lost(name):
    assert view_of(LOST[name], (6, 4)) is None


def test_atoms_are_dealt_out_to_axes_where_they_fall_on_digits():
    whole = (Atom(0, 1, 12, 0, 12),)
    assert split(whole, (3, 4)) == ((Atom(0, 4, 3, 0, 3),), (Atom(0, 1, 4, 0, 4),))
    assert split(whole, (5, 2)) is None
    cut = (Atom(0, 1, 12, 2, 8),)
    assert split(cut, (6,)) == (cut,)
    assert split(cut, (2, 3)) is None


def test_digits_that_follow_one_another_cover_what_their_axis_does():
    assert covers(frozenset({Atom(0, 4, 3, 0, 3), Atom(0, 1, 4, 0, 4)})) == {Atom(0, 1, 12, 0, 12)}
    part = Atom(0, 4, 3, 0, 2)
    assert covers(frozenset({part, Atom(0, 1, 4, 0, 4)})) == {part, Atom(0, 1, 4, 0, 4)}


def test_a_factor_is_arranged_in_the_order_of_the_leaf():
    low, high = Atom(0, 1, 3, 0, 3), Atom(0, 3, 2, 0, 2)
    roles = RolesOfAxes(((("x", low),), POSITIONS, (("x", high),)))
    array = jnp.arange(30.0).reshape(3, 5, 2)
    assert count(roles, array.shape) == (1, 5, 6)
    expected = np.asarray(array).transpose(1, 2, 0).reshape(1, 5, 6)
    np.testing.assert_array_equal(arrange(array, roles), expected)
