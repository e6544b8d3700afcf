"""The transposed Jacobian of a batch from its features: J^T c, without differentiating again.

What features have of a part is in an order of their own. Which entry of which leaf each number is
of follows by laying out the numbers of the entries as the factors are laid out.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.factors.pair import Factors, Shape, bias_of, first_use
from lazyjax.factors.planning import JACOBIAN, Features, Plan, leaf_of, members
from lazyjax.factors.views import Atom, Roles, arrange
from lazyjax.holomorphy import is_complex
from lazyjax.types import Weights


def pull_part(f: Factors, shape: Shape, z: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Compute the share of a part in J^T c, without uses that are swapped.

    Parameters
    ----------
    f : Factors
    shape : Shape
    z : (..., n, b, s, q)
        The cotangents d, summed over the outputs with the weights c.

    Returns
    -------
    (..., b, p, q), of tokens (..., p, q); and (..., b, q) of the bias
    """
    bias = None if f.bias is None else jnp.einsum("nb,...nbsq->...bq", f.bias, z)
    if not shape.tokens:
        return jnp.einsum("nbsp,...nbsq->...bpq", f.a, z), bias
    ids = jnp.where(f.a >= 0, f.a, shape.tokens).reshape(-1)

    def summed(z: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(z.reshape(-1, shape.q), ids, num_segments=shape.tokens)

    rows = jax.vmap(summed)(z.reshape(-1, *z.shape[-4:]))
    return rows.reshape(*z.shape[:-4], shape.tokens, shape.q), bias


# --- which entries these are --------------------------------------------------------------------


def _along(atoms: tuple[Atom, ...], steps: tuple[int, ...], counted: frozenset[Atom]) -> np.ndarray:
    """Give what each place along an axis adds to the number of an entry, by the counted atoms."""
    total = np.zeros(1, int)
    for atom in atoms:
        digits = np.arange(atom.start, atom.stop) * (atom in counted)
        digits = digits[::-1] if atom.flipped else digits
        total = (total[:, None] + digits * atom.stride * steps[atom.axis]).reshape(-1)
    return total


def _laid_out(
    axes: list[tuple[Atom, ...]], steps: tuple[int, ...], counted: Iterable[Atom]
) -> np.ndarray:
    """Give the numbers of the entries of an array with such axes."""
    total = np.zeros((1,) * len(axes), int)
    for i, atoms in enumerate(axes):
        along = _along(atoms, steps, frozenset(counted))
        total = total + along.reshape([-1 if j == i else 1 for j in range(len(axes))])
    return total


def _steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _of_factor(roles: Roles, steps: tuple[int, ...], *kinds: str) -> np.ndarray:
    """Give (b, 1, x): what each entry of a factor adds, by its atoms of some kinds."""
    axes = [() if isinstance(r, str) else tuple(atom for _, atom in r) for r in roles.axes]
    return arrange(_laid_out(axes, steps, roles.atoms(*kinds)), roles)


def _of_weights(plan: Plan, i: int) -> np.ndarray:
    """Give the entries of its leaf that part i is of, (b, p, q)."""
    part, shape = plan.parts[i], plan.shapes[i]
    use = first_use(part, plan.structure.uses)
    steps = _steps(plan.jaxpr.in_avals[leaf_of(part)].shape)
    start = sum(atom.start * atom.stride * steps[atom.axis] for atom in use.view.cuts)
    cotangent = _of_factor(use.d, steps, "b", "x")
    own = np.swapaxes(_of_factor(use.a, steps, "x"), 1, 2)
    return np.broadcast_to(start + own + cotangent, (shape.b, shape.p, shape.q))


def _of_bias(plan: Plan, i: int) -> np.ndarray:
    """Give the entries of the bias of part i, (b, q)."""
    part = plan.parts[i]
    use, bias = first_use(part, plan.structure.uses), bias_of(part)
    steps = _steps(plan.jaxpr.in_avals[bias.leaf].shape)
    axes = [axis or () for axis in (*bias.view.levels, *bias.view.axes)]
    every = [atom for axis in axes for atom in axis]
    return arrange(_laid_out(axes, steps, every), use.d)[:, 0]


class _Piece(NamedTuple):
    """Some entries of a leaf, as an array of their numbers."""

    leaf: int
    numbers: np.ndarray  # (b, p, q), or flat
    swapped: bool = False  # the features have (b, q, p)

    def of(self, values: jax.Array) -> jax.Array:
        """Give the values of the entries, flat, in the order of the numbers."""
        if not self.swapped:
            return values
        b, p, q = self.numbers.shape
        return jnp.swapaxes(values.reshape(b, q, p), 1, 2).reshape(-1)


def _joined(pieces: dict[int, list[_Piece]], apart: bool) -> dict[int, list[_Piece]]:
    """Join pieces as their Jacobians are joined."""
    lengths = {leaf: [piece.numbers.size for piece in own] for leaf, own in pieces.items()}
    return {
        key: [pieces[leaf][i] for leaf, i in every]
        for key, every in members(lengths, apart=apart).items()
    }


def _of_plain(w: Weights, leaves: Iterable[int]) -> dict[int, list[_Piece]]:
    return {leaf: [_Piece(leaf, np.arange(np.size(w[leaf])))] for leaf in leaves}


class _Pieces(NamedTuple):
    """What the features of a plan are of."""

    weights: dict[int, list[_Piece]]  # by part, those alike next to each other along b
    biases: dict[int, list[_Piece]]
    jacobians: dict[int, list[_Piece]]


def _pieces(plan: Plan, w: Weights) -> _Pieces:
    """Say which entries the features have, in the order of `features`."""
    rest = _of_plain(w, plan.plain)
    weights: dict[int, list[_Piece]] = {}
    biases: dict[int, list[_Piece]] = {}
    for i, (part, shape, treatment) in enumerate(
        zip(plan.parts, plan.shapes, plan.treatments, strict=True)
    ):
        first = plan.alike(i)[0]
        if shape.bias:
            bias = _Piece(bias_of(part).leaf, _of_bias(plan, i))
            own, key = (rest, bias.leaf) if treatment.through_j else (biases, first)
            own.setdefault(key, []).append(bias)
        alone = part.leaf is None
        numbers = _of_bias(plan, i)[:, None] if alone else _of_weights(plan, i)
        piece = _Piece(leaf_of(part), numbers, treatment.formed and not shape.tokens)
        own, key = (rest, piece.leaf) if treatment.formed else (weights, first)
        own.setdefault(key, []).append(piece)
    return _Pieces(weights, biases, _joined(rest, plan.apart))


def pull(plan: Plan, w: Weights, features: Features, c: jax.Array) -> Weights:
    """Compute J^T c, leaf by leaf.

    Parameters
    ----------
    plan : Plan
    w : list of arrays
    features : dict
        Of a batch, by that plan.
    c : (n, k)

    Returns
    -------
    list of arrays
        Shaped like w. Of complex derivatives sum_nk c_nk J_nk, without a conjugation.
    """
    pieces = _pieces(plan, w)

    def weighted(d: jax.Array) -> jax.Array:
        return jnp.sum(d * c[:, :, None, None, None], 1)

    found = []
    for group, own in features.items():
        if group == JACOBIAN.group:
            found += _of_jacobians(own, c, pieces.jacobians)
            continue
        for i, f in own.items():
            value, bias = pull_part(f, plan.shapes[i], weighted(f.d))
            if f.d_swapped is not None:
                value = value + jnp.einsum("nbsp,nbsq->bpq", weighted(f.d_swapped), f.a_swapped)
            found.append((value, pieces.weights[i]))
            if bias is not None:
                found.append((bias, pieces.biases[i]))
    return _by_leaf(found, w)


def pull_jacobians(
    w: Weights, jacobians: dict[int, jax.Array], c: jax.Array, *, apart: bool
) -> Weights:
    """Compute J^T c from the plain Jacobians of all leaves, as `join` gives them."""
    pieces = _joined(_of_plain(w, range(len(w))), apart)
    return _by_leaf(_of_jacobians(jacobians, c, pieces), w)


_Found = tuple[jax.Array, list[_Piece]]
"""Values, and the pieces that they are of, one after the other."""


def _of_jacobians(
    jacobians: dict[int, jax.Array], c: jax.Array, pieces: dict[int, list[_Piece]]
) -> list[_Found]:
    return [(jnp.einsum("nkp,nk->p", j, c), pieces[i]) for i, j in jacobians.items()]


def _by_leaf(found: list[_Found], w: Weights) -> Weights:
    """Sort values into leaves; entries that are not there are 0."""
    values: list[list[jax.Array]] = [[] for _ in w]
    numbers: list[list[np.ndarray]] = [[] for _ in w]
    for flat, pieces in found:
        ends = np.cumsum([piece.numbers.size for piece in pieces])
        for piece, part in zip(pieces, jnp.split(flat.reshape(-1), ends[:-1]), strict=True):
            values[piece.leaf].append(piece.of(part))
            numbers[piece.leaf].append(piece.numbers.reshape(-1))
    return [
        _whole(leaf, jnp.concatenate(own), np.concatenate(at)) if own else jnp.zeros_like(leaf)
        for leaf, own, at in zip(w, values, numbers, strict=True)
    ]


def _whole(leaf: jax.Array, values: jax.Array, numbers: np.ndarray) -> jax.Array:
    """Put values at the entries of a leaf that have these numbers."""
    where = np.full(np.size(leaf), numbers.size)
    where[numbers] = np.arange(numbers.size)
    if numbers.size < where.size:
        values = jnp.append(values, jnp.zeros((), values.dtype))
    if (where != np.arange(where.size)).any():
        values = values[where]
    values = values if is_complex(leaf) else values.real
    return values.reshape(np.shape(leaf)).astype(leaf.dtype)
