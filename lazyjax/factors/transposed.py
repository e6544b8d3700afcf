"""The transposed Jacobian of a batch from its features: J^T c, without differentiating again.

What features have of a part is in an order of their own. Which entry of which leaf each number is
of follows by laying out the numbers of the entries as the factors are laid out.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.factors.pair import Factors, Shape, bias_of, first_use
from lazyjax.factors.planning import JACOBIAN, Features, Plan, join, leaf_of
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
    (..., b, p, q), and (..., b, q) of the bias
    """
    bias = None if f.bias is None else jnp.einsum("nb,...nbsq->...bq", f.bias, z)
    if not shape.tokens:
        return jnp.einsum("nbsp,...nbsq->...bpq", f.a, z), bias
    ids = jnp.where(f.a >= 0, f.a, shape.tokens).reshape(-1)

    def summed(z: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(z.reshape(-1, shape.q), ids, num_segments=shape.tokens)

    rows = jax.vmap(summed)(z.reshape(-1, *z.shape[-4:]))
    return rows.reshape(*z.shape[:-4], 1, shape.tokens, shape.q), bias


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


def _of_plain(w: Weights, leaves: Iterable[int]) -> dict[int, list[Any]]:
    """Give the numbers of all entries of some leaves."""
    ends = np.cumsum([np.size(leaf) for leaf in w])
    return {i: [np.arange(ends[i] - np.size(w[i]), ends[i])[None]] for i in leaves}


def _entries(plan: Plan, w: Weights) -> dict[str, dict[int, Any]]:
    """Give the numbers of the entries, as the features have them, leaf after leaf."""
    offsets = np.cumsum([0, *(np.size(leaf) for leaf in w)])
    rest = _of_plain(w, plan.plain)
    gathered: dict[int, list[tuple[np.ndarray, np.ndarray | None]]] = {}
    for i, (part, shape, treatment) in enumerate(
        zip(plan.parts, plan.shapes, plan.treatments, strict=True)
    ):
        bias = None
        if part.leaf is None:
            own = offsets[leaf_of(part)] + _of_bias(plan, i)[:, None]
        else:
            own = offsets[part.leaf] + _of_weights(plan, i)
            if shape.bias:
                bias = offsets[bias_of(part).leaf] + _of_bias(plan, i)
        if treatment.through_j and bias is not None:
            rest.setdefault(bias_of(part).leaf, []).append(bias.reshape(1, -1))
            bias = None
        if treatment.formed:
            flat = own if shape.tokens else np.swapaxes(own, 1, 2)
            rest.setdefault(leaf_of(part), []).append(flat.reshape(1, -1))
        else:
            gathered.setdefault(plan.alike(i)[0], []).append((own, bias))
    groups: dict[str, dict[int, Any]] = {}
    for i, every in gathered.items():
        weights, biases = zip(*every, strict=True)
        joined = None if biases[0] is None else np.concatenate(biases)
        groups.setdefault(plan.treatments[i].group, {})[i] = np.concatenate(weights), joined
    if rest:
        groups[JACOBIAN.group] = _joined(rest, plan.apart)
    return groups


def _joined(numbers: dict[int, list[Any]], apart: bool) -> dict[int, np.ndarray]:
    """Join the numbers of entries as their Jacobians are joined."""
    with jax.ensure_compile_time_eval():
        return {i: np.asarray(a) for i, a in join(numbers, apart=apart).items()}


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
    entries = _entries(plan, w)
    values: list[jax.Array] = []
    numbers: list[np.ndarray] = []

    def put(value: jax.Array, of: np.ndarray) -> None:
        values.append(value.reshape(-1))
        numbers.append(np.asarray(of).reshape(-1))

    def weighted(d: jax.Array) -> jax.Array:
        return jnp.sum(d * c[:, :, None, None, None], 1)

    for group, own in features.items():
        for i, f in own.items():
            if group == JACOBIAN.group:
                put(jnp.einsum("nkp,nk->p", f, c), entries[group][i])
                continue
            shape = plan.shapes[i]
            value, bias = pull_part(f, shape, weighted(f.d))
            if f.d_swapped is not None:
                value = value + jnp.einsum("nbsp,nbsq->bpq", weighted(f.d_swapped), f.a_swapped)
            weights, biases = entries[group][i]
            put(value, weights)
            if bias is not None:
                put(bias, biases)
    flat, at = jnp.concatenate(values), np.concatenate(numbers)
    return _by_leaf(flat, at, w)


def pull_jacobians(
    w: Weights, jacobians: dict[int, jax.Array], c: jax.Array, *, apart: bool
) -> Weights:
    """Compute J^T c from the plain Jacobians of all leaves, as `join` gives them."""
    numbers = _joined(_of_plain(w, range(len(w))), apart)
    values = [jnp.einsum("nkp,nk->p", j, c) for j in jacobians.values()]
    flat = np.concatenate([numbers[i].reshape(-1) for i in jacobians])
    return _by_leaf(jnp.concatenate(values), flat, w)


def _by_leaf(flat: jax.Array, at: np.ndarray, w: Weights) -> Weights:
    """Sort numbers, of entry `at` each, into leaves; entries that are not there are 0."""
    sizes = [int(np.size(leaf)) for leaf in w]
    where = np.full(sum(sizes), at.size)
    where[at] = np.arange(at.size)
    padded = jnp.append(flat, jnp.zeros((), flat.dtype)) if (where == at.size).any() else flat
    leaves, start = [], 0
    for leaf, size in zip(w, sizes, strict=True):
        own = where[start : start + size]
        start += size
        if size and own[0] + size == own[-1] + 1 and (np.diff(own) == 1).all():
            part = jax.lax.slice_in_dim(padded, int(own[0]), int(own[-1]) + 1)
        else:
            part = padded[own]
        part = part if is_complex(leaf) else part.real
        leaves.append(part.reshape(np.shape(leaf)).astype(leaf.dtype))
    return leaves
