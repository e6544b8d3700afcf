"""A network's operations, read one after the other into a graph of fields."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from lazyjax.equations import (
    Jaxpr,
    evaluate,
    inlined,
    is_custom_jvp,
    is_custom_vjp,
    needed,
    settings,
)
from lazyjax.equations import (
    known as can_be_read,
)
from lazyjax.limits.graph import Graph
from lazyjax.limits.layouts import (
    Atom,
    Axes,
    channels,
    of_positions,
    positions,
    refine,
    widths,
)
from lazyjax.limits.moments import Moments
from lazyjax.limits.nodes import (
    Deterministic,
    Entries,
    Known,
    Node,
    now,
    product_of,
    source,
)
from lazyjax.limits.pointwise import POINTWISE, as_text, has_own_rule, is_pointwise
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import (
    Fixed,
    Leaf,
    Value,
    Wide,
    at_positions,
    fixed,
)


class Reader:
    """What is known while a network is read."""

    def __init__(
        self,
        moments: Moments,
        operations: dict[str, Any],
        size: int,
        zeros: list[Any],
        *,
        trusted: bool,
    ) -> None:
        self.zeros = zeros  # constants that are 0
        self.operations = operations
        self.graph = Graph()
        self.moments = moments
        self.trusted = trusted
        self.used = np.zeros(size, bool)  # which weights have been
        self.contracted: set[int] = set()  # widths that products have summed over
        self._same: dict[int, int] = {}  # widths that additions have found to be one
        self._widths = 0

    # --- widths ---

    def new_width(self, length: int) -> Atom:
        """Give a width of its own."""
        self._widths += 1
        return Atom(length, self._widths)

    def root(self, width: int) -> int:
        """Give the first of the widths that are one."""
        while width in self._same:
            width = self._same[width]
        return width

    def unite(self, one: int, other: int) -> None:
        """Make two widths one."""
        one, other = self.root(one), self.root(other)
        if one != other:
            self._same[max(one, other)] = min(one, other)

    def is_contracted(self, axes: Axes) -> bool:
        """Tell whether a product has summed over channels of these axes."""
        return bool({self.root(w) for w in widths(axes)} & set(map(self.root, self.contracted)))

    def use(self, leaf: Leaf, where: str) -> None:
        """Take weights, which are there once."""
        entries = np.unique(leaf.entries)
        if self.used[entries].any():
            refuse(f"the weight {leaf.name}, which is used twice", "Give each use its own", where)
        self.used[entries] = True

    # --- values ---

    def at(self, value: Fixed, axes: Axes, where: str) -> Known:
        """Give what is not random at the positions of a field."""
        return at_positions(value, axes, trusted=self.trusted, where=where)

    def moved(
        self,
        value: Wide,
        operation: Callable[..., jax.Array],
        axes: Axes,
        key: Any,
        *,
        selects: bool = True,
        fills: bool = False,
        mix: Known | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Wide:
        """Apply a linear map to the positions of a field."""
        shape = positions(axes) if shape is None else shape
        options = {"selects": selects, "fills": fills, "mix": mix}
        return value.map(
            lambda node: self.graph.moved(node, operation, shape, (key, node.shape), **options),
            axes,
        )

    def reshaped(self, value: Wide, axes: Axes, shape: tuple[int, ...] | None = None) -> Wide:
        """Lay the positions of a field out anew, in the same order."""
        shape = positions(axes) if shape is None else shape
        if all(node.shape == shape for _, node in value.parts):
            return Wide(value.parts, axes)
        key = ("reshape", shape)
        return self.moved(value, lambda a: a.reshape(shape), axes, key, shape=shape)

    def merged(self, value: Wide, axis: int, where: str) -> Wide:
        """Make the positions along an axis one atom."""
        atoms = value.axes[axis]
        if any(a.width is not None for a in atoms):
            refuse("an operation along the width", "", where)
        length = value.shape[axis]
        axes = (*value.axes[:axis], (Atom(length),) if length > 1 else (), *value.axes[axis + 1 :])
        return self.reshaped(value, axes)

    def field_of(self, leaf: Leaf, axes: Axes, where: str) -> Node:
        """Make a field of weights that are added: a bias."""
        self.use(leaf, where)
        pattern = self.pattern(leaf, axes, where)
        ones = replace(fixed(np.ones((), self.moments.dtype), len(self.moments.sizes)))
        factor = self.at(ones if leaf.factor is None else leaf.factor, axes, where)
        node = source(Entries, positions(axes), pattern, leaf.variance, factor)
        if leaf.values is None or leaf.values.zero:
            return node
        value = self.at(leaf.values, axes, where)
        return self.graph.sum(node, Deterministic(positions(axes), product_of(value, factor)))

    def pattern(self, leaf: Leaf, axes: Axes, where: str) -> np.ndarray:
        """Give the numbers of the entries of one channel; each channel must have its own."""
        atoms = [a for axis in axes for a in axis]
        if leaf.entries.size != np.prod([a.length for a in atoms], dtype=int):
            self._refuse_shared(leaf, where)
        entries = leaf.entries.reshape([a.length for a in atoms])
        order = [i for i, a in enumerate(atoms) if a.width is None]
        order += [i for i, a in enumerate(atoms) if a.width is not None]
        rows = entries.transpose(order).reshape(-1, channels(axes))
        first = rows[:, 0]
        if np.unique(rows).size != np.unique(first).size * rows.shape[1]:
            self._refuse_shared(leaf, where)
        return first.reshape(positions(axes))

    def _refuse_shared(self, leaf: Leaf, where: str) -> None:
        refuse(
            f"the weight {leaf.name}, which several channels share",
            "Give each channel its own, or keep it in f as a constant",
            where,
        )

    # --- one operation after the other ---

    def read(self, closed: Jaxpr, inputs: list[Value]) -> list[Value]:
        """Read a jaxpr."""
        jaxpr = closed.jaxpr
        values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        n = len(self.moments.sizes)
        for v, c in zip(jaxpr.constvars, closed.consts, strict=True):
            values[v] = replace(fixed(c, n), zero=any(c is zero for zero in self.zeros))

        def of(atom: Any) -> Value:
            return fixed(np.asarray(atom.val), n) if isinstance(atom, Literal) else values[atom]

        for equation, is_needed in zip(jaxpr.eqns, needed(jaxpr), strict=True):
            if is_needed:
                given = list(map(of, equation.invars))
                out = self.step(jaxpr, equation, given)
                values |= dict(zip(equation.outvars, out, strict=True))
        return list(map(of, jaxpr.outvars))

    def step(self, jaxpr: Any, equation: Any, given: list[Value]) -> list[Value]:
        """Read one equation."""
        name, where = equation.primitive.name, as_text(equation)
        fixed_ones = [v for v in given if isinstance(v, Fixed) and v.count == 1]
        # what is repeated stays short, so that it is known to be the same
        if len(fixed_ones) == len(given) and name != "broadcast_in_dim":
            return _evaluated(jaxpr, equation, fixed_ones, len(self.moments.sizes))
        body = inlined(equation)
        if body is not None and not (is_custom_jvp(equation) and has_own_rule(equation)):
            return self.read(body, given)
        if is_custom_jvp(equation) or is_custom_vjp(equation):
            if any(isinstance(v, Leaf) for v in given) or not is_pointwise(equation):
                refuse(f"a function with a derivative of its own ({name})", "", where)
            return [self.pointwise(jaxpr, equation, given, "custom", where)]
        if not can_be_read(equation):
            refuse(f"`{name}` as this JAX has it", "", where)
        if name in POINTWISE:  # which repeat what has length 1
            shape = tuple(equation.outvars[0].aval.shape)
            given = [self.repeated(v, shape, where) for v in given]
        if name in self.operations:
            out = self.operations[name](self, equation, given, where)
            if out is not None:
                return out if isinstance(out, list) else [out]
        if name in POINTWISE:
            given = self.as_fields(given, where)
            if any(isinstance(v, Fixed) and v.count != 1 for v in given):
                refuse(
                    "a sum over the width that is not divided by about as much",
                    "Take the mean",
                    where,
                )
            label = f"{name}:{settings(equation).power}" if name == "integer_pow" else name
            return [self.pointwise(jaxpr, equation, given, label, where)]
        kinds = [v.name for v in given if isinstance(v, Leaf)]
        if kinds:
            refuse(
                f"the weight {kinds[0]} in `{name}`", "Let it enter by a product, or a sum", where
            )
        return refuse(f"`{name}`, of which no limit is known", "", where)

    def repeated(self, value: Value, shape: tuple[int, ...], where: str) -> Value:
        """Repeat what is random, or weights, to a shape of the same rank."""
        if isinstance(value, Fixed) or value.shape == shape or len(value.shape) != len(shape):
            return value
        return self.operations["repeat"](self, shape, [value], where)

    def as_fields(self, given: list[Value], where: str) -> list[Value]:
        """Make fields of weights that are random, before a function of them."""
        random = [v for v in given if isinstance(v, Leaf)]
        if not random:
            return given
        if any(v.values is not None for v in random):
            refuse(f"a function of the weight {random[0].name}, which is not random", "", where)
        fields = [v for v in given if isinstance(v, Wide)]
        axes = fields[0].axes if fields else self.axes_of_weights(given, random[0].shape)
        return [
            Wide(((channels(axes), self.field_of(v, axes, where)),), axes)
            if isinstance(v, Leaf)
            else v
            for v in given
        ]

    def axes_of_weights(self, given: list[Value], shape: tuple[int, ...]) -> Axes:
        """Give axes to weights that no field says them of: the last one is the width.

        Where something that is not random differs along it, every entry is a position.
        """
        known = [s for v in given if isinstance(v, Fixed) for s in v.sides]
        if not shape or shape[-1] == 1 or any(s.ndim > 1 and s.shape[-1] > 1 for s in known):
            return of_positions(shape)
        return (*of_positions(shape[:-1]), (self.new_width(shape[-1]),))

    def together(self, given: list[Value], where: str) -> tuple[list[Value], Axes]:
        """Bring fields that meet entry by entry to the same axes and groups of channels."""
        fields = [v for v in given if isinstance(v, Wide)]
        axes = fields[0].axes
        for other in fields[1:]:
            cut = [refine(a, b) for a, b in zip(axes, other.axes, strict=True)]
            if any(c is None for c in cut):
                refuse("positions and channels that meet entry by entry", "", where)
            axes = tuple(c for c in cut if c is not None)
        for other in fields:
            for own, its in zip(axes, other.axes, strict=True):
                wide = [a.width for a in own if a.width is not None]
                for one, two in zip(wide, [a.width for a in its if a.width is not None]):  # noqa: B905 (the other may be cut less)
                    self.unite(one, two)
        out: list[Value] = [self.reshaped(v, axes) if isinstance(v, Wide) else v for v in given]
        counts = {tuple(count for count, _ in v.parts) for v in out if isinstance(v, Wide)}
        groups = max(counts, key=len)
        if any(len(c) > 1 and c != groups for c in counts):
            refuse("fields whose groups of channels are cut at different places", "", where)
        if len(groups) > 1:
            out = [self.cut(v, groups) if isinstance(v, Wide) else v for v in out]
        return out, axes

    def cut(self, value: Wide, groups: tuple[int, ...]) -> Wide:
        """Cut one group of channels into several."""
        if len(value.parts) > 1:
            return value
        (node,) = [node for _, node in value.parts]
        ends = np.cumsum(groups)
        parts = [
            (count, self.graph.restrict(node, ("slice", int(end) - count, int(end), 1)))
            for count, end in zip(groups, ends, strict=True)
        ]
        return Wide(tuple(parts), value.axes)

    def pointwise(
        self, jaxpr: Any, equation: Any, given: list[Value], name: str, where: str
    ) -> Wide:
        """Apply a function entry by entry."""
        given, axes = self.together(given, where)
        known = [self.at(v, axes, where) if isinstance(v, Fixed) else None for v in given]

        def call(*values: jax.Array) -> jax.Array:
            at = {
                id(atom): v.astype(atom.aval.dtype)
                for v, atom in zip(values, equation.invars, strict=True)
                if not isinstance(atom, Literal)
            }
            return evaluate(jaxpr, equation, lambda v: at[id(v)])[0]

        def function(*values: jax.Array) -> jax.Array:
            shape = jnp.broadcast_shapes(*(jnp.shape(v) for v in values))
            rank = len(shape)
            same = [jnp.reshape(v, (1,) * (rank - jnp.ndim(v)) + jnp.shape(v)) for v in values]
            same = [jnp.broadcast_to(v, shape) for v in same]
            # what has a body of its own may hold the shape that it was traced with
            out = _in_own_shape(call, equation, same) if name == "custom" else call(*same)
            return out.astype(values_dtype) if jnp.issubdtype(out.dtype, jnp.floating) else out

        values_dtype = self.moments.dtype
        (groups,) = {tuple(count for count, _ in v.parts) for v in given if isinstance(v, Wide)}
        parts = []
        for i, count in enumerate(groups):
            arguments = [
                v.parts[i][1] if isinstance(v, Wide) else k
                for v, k in zip(given, known, strict=True)
            ]
            parts.append((count, self.graph.pointwise(name, function, arguments)))
        return Wide(tuple(parts), axes)


def _in_own_shape(
    call: Callable[..., jax.Array], equation: Any, values: list[jax.Array]
) -> jax.Array:
    """Apply a function entry by entry to arrays of any shape, in pieces of the shape it has."""
    own = tuple(equation.outvars[0].aval.shape)
    size, total = int(np.prod(own)), values[0].size
    pieces = -(-total // size)

    def cut(v: jax.Array, atom: Any) -> jax.Array:
        if not atom.aval.shape:
            return jnp.broadcast_to(v.reshape(-1)[0], pieces)
        flat = jnp.pad(v.reshape(-1), (0, pieces * size - total), mode="edge")
        return flat.reshape(pieces, *own)

    cuts = [cut(v, atom) for v, atom in zip(values, equation.invars, strict=True)]
    return jax.vmap(call)(*cuts).reshape(-1)[:total].reshape(values[0].shape)


def _evaluated(jaxpr: Any, equation: Any, given: list[Fixed], count: int) -> list[Value]:
    """Evaluate what is not random, as it is."""
    entrywise = equation.primitive.name in POINTWISE
    done: dict[Any, list[Any]] = {}
    sides: list[list[Any]] = []
    for i in range(count):
        arrays = [v.sides[i] if entrywise else v.full()[i] for v in given]
        key = tuple(id(v.sides[i]) for v in given)
        if key not in done:
            done[key] = _one_side(jaxpr, equation, arrays, entrywise)
        sides.append(done[key])
    zero = entrywise and _stays_zero(equation.primitive.name, given)
    return [
        Fixed(tuple(side[j] for side in sides), tuple(v.aval.shape), zero=zero)
        for j, v in enumerate(equation.outvars)
    ]


def _stays_zero(name: str, given: list[Fixed]) -> bool:
    if name in ("neg", "convert_element_type", "copy", "square", "div"):
        return given[0].zero
    return name == "mul" and any(v.zero for v in given)


def _one_side(jaxpr: Any, equation: Any, arrays: list[Any], entrywise: bool) -> list[Any]:
    def call(*inputs: Any) -> list[Any]:
        at = {
            id(v): value
            for v, value in zip(equation.invars, inputs, strict=True)
            if not isinstance(v, Literal)
        }
        return evaluate(jaxpr, equation, lambda v: at[id(v)])

    def apply() -> list[Any]:
        if entrywise:
            rank = max((a.ndim for a in arrays), default=1)
            same = [a.reshape(*a.shape, *(1,) * (rank - a.ndim)) for a in map(jnp.asarray, arrays)]
            shape = jnp.broadcast_shapes(*(a.shape for a in same))
            return call(*(jnp.broadcast_to(a, shape) for a in same))
        if all(a.shape[0] == 1 for a in arrays):
            return [jnp.asarray(v)[None] for v in call(*(jnp.asarray(a)[0] for a in arrays))]
        axes = [None if a.shape[0] == 1 else 0 for a in arrays]
        inputs = [a[0] if a.shape[0] == 1 else a for a in map(jnp.asarray, arrays)]
        return jax.vmap(call, axes)(*inputs)

    return now(lambda *_: apply(), *arrays)
