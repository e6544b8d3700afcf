"""Products with weights: where fields are made. Products with what is not random."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.equations import settings
from lazyjax.limits.entrywise import of_kind
from lazyjax.limits.layouts import Atom, Axes, channels, is_wide, of_positions, places_of, positions
from lazyjax.limits.nodes import Deterministic, Node, Product, Tokens, Window, source
from lazyjax.limits.reading import Reader
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import Fixed, Leaf, Value, Wide, layout


def _scalar_of(reader: Reader, leaf: Leaf, where: str) -> Any:
    """Give the number that weights are multiplied by before a product."""
    if leaf.variance is None:
        refuse(
            f"the matrix {leaf.name}, which is not random",
            "Give it a variance, or keep it in f as a constant",
            where,
        )
    if leaf.factor is None:
        return 1.0
    same = all(s.size == 1 for s in leaf.factor.sides)
    number = leaf.factor.number()
    if number is not None:
        return number
    if not same or any(s is not leaf.factor.sides[0] for s in leaf.factor.sides):
        refuse(f"the weight {leaf.name} times numbers that differ", "", where)
    return jnp.asarray(leaf.factor.sides[0]).reshape(()).astype(reader.moments.dtype)


def _as_wide(reader: Reader, value: Value, where: str) -> Wide:
    if isinstance(value, Wide):
        return value
    assert isinstance(value, Fixed)
    axes = of_positions(value.shape)
    node = Deterministic(positions(axes), of_kind(reader, reader.at(value, axes, where)))
    return Wide(((1, node),), axes)


def _fresh(reader: Reader, leaf: Leaf, where: str) -> None:
    """Require that the entries of a matrix are all different weights, and take them."""
    if np.unique(leaf.entries).size != leaf.entries.size:
        refuse(f"the weight {leaf.name}, some entries of which stand at several places", "", where)
    reader.use(leaf, where)


def _contractible(reader: Reader, x: Wide, gone: list[int], stays: list[int], where: str) -> None:
    """Require that a product sums over all channels of what is random."""
    for i, axis in enumerate(x.axes):
        if i not in gone and i not in stays and is_wide(axis):
            refuse("a product that leaves channels as they are", "Contract all of the width", where)
    if x.random and not any(is_wide(x.axes[i]) for i in gone):
        refuse(
            "a product of what is random that sums over no width",
            "Let weights sum over a wide axis",
            where,
        )
    if x.random:
        reader.contracted |= {a.width for i in gone for a in x.axes[i] if a.width is not None}


def _terms(x: Wide, gone: list[int]) -> tuple[tuple[int, Node], ...]:
    """Give how many channels of each group a sum over axes counts."""
    counted = math.prod(a.length for i in gone for a in x.axes[i] if a.width is not None)
    if len(x.parts) == 1:
        return ((counted, x.parts[0][1]),)
    total = sum(n for n, _ in x.parts)
    return tuple((counted * n // total, node) for n, node in x.parts)


def dot(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Contract a field with weights, or positions with what is not random."""
    (contracted, shared) = settings(equation).numbers
    kinds = [isinstance(v, Leaf) for v in given]
    if all(kinds):
        refuse("a product of two weights", "Multiply the input by one after the other", where)
    if not any(kinds):
        return _dot_of_fields(reader, equation, given, where)
    at = kinds.index(True)
    leaf, x = given[at], _as_wide(reader, given[1 - at], where)
    assert isinstance(leaf, Leaf)
    factor = _scalar_of(reader, leaf, where)
    _fresh(reader, leaf, where)
    gone, stays = list(contracted[1 - at]), list(shared[1 - at])
    _contractible(reader, x, gone, stays, where)
    taken = {*contracted[at], *shared[at]}
    new: Axes = tuple(
        (reader.new_width(n),) if n > 1 else () for i, n in enumerate(leaf.shape) if i not in taken
    )
    places = places_of(x.axes)
    free = [i for i in range(len(x.axes)) if i not in (*gone, *stays)]
    kept = [p for i in (*stays, *free) for p in places[i]]
    batch = tuple(
        tuple(a if a.width is None else reader.new_width(a.length) for a in x.axes[i])
        for i in stays
    )
    rest = tuple(x.axes[i] for i in free)
    axes = (*batch, *new, *rest) if at == 0 else (*batch, *rest, *new)
    own = tuple(range(sum(len(places[i]) for i in stays)))
    if len(x.parts) > 1 and any(is_wide(x.axes[i]) for i in stays):
        refuse("groups of channels in a product of several", "", where)
    terms = _terms(x, gone)
    summed = tuple(p for i in gone for p in places[i])
    shape = positions(axes)
    node = source(Product, shape, terms, summed, tuple(kept), (), own, leaf.variance, factor)
    return Wide(((channels(axes), node),), axes)


def _dot_of_fields(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Mix positions by a matrix that is not random."""
    fields = [isinstance(v, Wide) for v in given]
    if all(fields):
        refuse(
            "a product of two fields, as the logits of attention are, which stays random at "
            "1 / sqrt(d)",
            "",
            where,
        )
    at = fields.index(True)
    x, matrix = given[at], given[1 - at]
    assert isinstance(x, Wide)
    if not isinstance(matrix, Fixed) or matrix.count != 1:
        return None
    (contracted, shared) = settings(equation).numbers
    for i in (*contracted[at], *shared[at]):
        x = reader.merged(x, i, where)
    places = places_of(x.axes)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = {p: next(letters) for axis in places for p in axis}
    same = {
        j: names[places[i][0]]
        for i, j in (
            *zip(contracted[at], contracted[1 - at], strict=True),
            *zip(shared[at], shared[1 - at], strict=True),
        )
        if places[i]
    }
    own = [same.get(j) or next(letters) for j in range(len(matrix.shape))]
    stays = list(shared[at])
    free = [i for i in range(len(x.axes)) if i not in (*contracted[at], *stays)]
    others = [
        j for j in range(len(matrix.shape)) if j not in (*contracted[1 - at], *shared[1 - at])
    ]
    batch = tuple(x.axes[i] for i in stays)
    rest = tuple(x.axes[i] for i in free)
    new = of_positions(tuple(matrix.shape[j] for j in others))
    axes = (*batch, *rest, *new) if at == 0 else (*batch, *new, *rest)
    out_rest = [names[p] for i in free for p in places[i]]
    out_new = [own[j] for j in others if matrix.shape[j] > 1]
    out_batch = [names[p] for i in stays for p in places[i]]
    out = [*out_batch, *(out_rest + out_new if at == 0 else out_new + out_rest)]
    spec = f"{''.join(names.values())},{''.join(own)}->{''.join(out)}"
    full = Fixed(matrix.full(), matrix.shape)
    known = of_kind(reader, reader.at(full, of_positions(matrix.shape), where))
    sizes = matrix.shape

    def mix(a: jax.Array, m: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, m.reshape(sizes), precision="highest")

    return reader.moved(x, mix, axes, ("mix", spec), selects=False, mix=known)


def convolution(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Contract windows of positions and the width with weights."""
    how = settings(equation)
    inputs, leaf = given
    if not isinstance(leaf, Leaf) or isinstance(inputs, Leaf):
        refuse("a convolution whose filters are no weights", "", where)
    x = _as_wide(reader, inputs, where)
    numbers = how.numbers
    batch, feature, *spatial = numbers.lhs_spec
    if x.axes[batch] or how.batch_groups != 1:
        refuse("a convolution over a batch that is not that of the examples", "", where)
    for i in spatial:
        x = reader.merged(x, i, where)
    if how.groups > 1 and (
        not is_wide(x.axes[feature]) or len(x.parts) > 1 or x.shape[feature] == how.groups
    ):
        refuse(
            "a convolution in groups that sum over no width",
            "Use groups of several channels of a field",
            where,
        )
    factor = _scalar_of(reader, leaf, where)
    _fresh(reader, leaf, where)
    _contractible(reader, x, [feature], [], where)
    # one axis of positions for each of the window, those of length 1 too
    dims: list[int] = []
    place: dict[int, int] = {}
    summed: list[int] = []
    for i, axis in enumerate(x.axes):
        if i in spatial:
            place[i] = len(dims)
            dims.append(x.shape[i])
        else:
            for atom in axis:
                if atom.width is None:
                    summed.append(len(dims))
                    dims.append(atom.length)
    x = reader.reshaped(x, x.axes, tuple(dims))
    out = equation.outvars[0].aval.shape
    order = sorted(range(len(spatial)), key=lambda s: numbers.out_spec[2 + s])
    kept = tuple(place[spatial[s]] for s in order)
    windows = tuple(
        Window(
            leaf.shape[numbers.rhs_spec[2 + s]],
            how.strides[s],
            tuple(how.padding[s]),
            how.input_steps[s],
            how.filter_steps[s],
        )
        for s in order
    )
    lengths = tuple(out[numbers.out_spec[2 + s]] for s in order)
    terms = tuple((n // how.groups, node) for n, node in _terms(x, [feature]))
    node = source(Product, lengths, terms, tuple(summed), kept, windows, (), leaf.variance, factor)
    axes: list[Any] = [()] * len(out)
    for s, n in zip(order, lengths, strict=True):
        axes[numbers.out_spec[2 + s]] = (Atom(n),) if n > 1 else ()
    width = out[numbers.out_spec[1]]
    axes[numbers.out_spec[1]] = (reader.new_width(width),) if width > 1 else ()
    return reader.reshaped(Wide(((width, node),), tuple(axes)), tuple(axes))


def gather(reader: Reader, equation: Any, given: list[Value], where: str) -> Any:
    """Look up rows of a table of weights."""
    table, places = given
    how = settings(equation)
    if not isinstance(table, Leaf) or not isinstance(places, Fixed):
        return None
    numbers = how.numbers
    simple = (
        tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(how.sizes) == (1, *table.shape[1:])
        and table.variance is not None
    )
    if not simple:
        refuse(f"a lookup in the weight {table.name} that is not of its rows", "", where)
    factor = _scalar_of(reader, table, where)
    _fresh(reader, table, where)
    out = equation.outvars[0].aval.shape
    axes: list[Any] = []
    for i, n in enumerate(out):
        wide = i in numbers.offset_dims
        axes.append(((reader.new_width(n),) if wide else (Atom(n),)) if n > 1 else ())
    rows = layout(places, lambda a: a.reshape(a.shape[:-1]), places.shape[:-1])
    rows = layout(rows, lambda a: jnp.clip(a, 0, table.shape[0] - 1), rows.shape)
    known = reader.at(rows, of_positions(rows.shape), where)
    node = source(Tokens, positions(tuple(axes)), known, table.variance, factor)
    return Wide(((channels(tuple(axes)), node),), tuple(axes))
