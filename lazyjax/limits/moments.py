"""The covariances of fields, and of their derivatives: NNGP kernels and NTKs, layer by layer.

For fields A, B of one channel, `second` is E A(x) B(x') and `tangent` is E <dA(x), dB(x')> over all
weights before them. Both are asked from the output back, and only at the pairs of positions that
are needed: of a flattened network every position with itself, of one that pools all with all.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.limits import activations, sources
from lazyjax.limits.arrays import Array, add, times
from lazyjax.limits.nodes import (
    Deterministic,
    Moved,
    Node,
    Pointwise,
    Query,
    Scaled,
    Source,
    Sum,
    Times,
    same_entries,
    scales,
)
from lazyjax.limits.profiles import Profile, profile_of
from lazyjax.limits.refusals import refuse


class Moments:
    """What has been computed of a graph, for examples of two sides.

    Parameters
    ----------
    sizes : tuple of int
        Examples of each side.
    degree : int
        Of quadratures.
    """

    def __init__(self, sizes: tuple[int, ...], degree: int, dtype: Any) -> None:
        self.sizes = sizes
        self.degree = degree
        self.dtype = dtype
        self.errors: list[jax.Array] = []  # of quadratures, relative
        self.largest = 1  # entries of the largest array for one pair
        self._known: dict[Any, Any] = {}
        self._profiles: dict[Node, Profile] = {}

    # --- what is asked ---

    def second(self, a: Node, b: Node, q: Query) -> Array:
        """Give E A(x) B(x')."""
        return self._once("second", a, b, q, self._second)

    def tangent(self, a: Node, b: Node, q: Query) -> Array:
        """Give E <dA(x), dB(x')>."""
        return self._once("tangent", a, b, q, self._tangent)

    def mean(self, a: Node, side: int) -> Array:
        """Give E A(x), (n, *positions)."""
        key = ("mean", a, side)
        if key not in self._known:
            self._known[key] = self._mean(a, side)
        return self._known[key]

    def _once(self, name: str, a: Node, b: Node, q: Query, compute: Any) -> Array:
        if not a.shape and not b.shape:
            q = q._replace(every=False)
        key = (name, a, b, q)
        if key not in self._known:
            self._known[key] = found = compute(a, b, q)
            if found is not None and q.crossed:
                self.largest = max(self.largest, int(np.prod(found.shape[2:])))
        return self._known[key]

    # --- shapes ---

    def spread(
        self, value: jax.Array, q: Query, right: bool, beside: int | None = None
    ) -> jax.Array:
        """Give (n, *positions) of one side as the query has pairs.

        `beside` is how many axes of positions the other side has, by default as many.
        """
        n, *positions = value.shape
        batch = (n,) if not q.crossed else (1, n) if right else (n, 1)
        ones = (1,) * (len(positions) if beside is None else beside)
        if not q.every:
            return value.reshape(*batch, *positions)
        return value.reshape(*batch, *((*ones, *positions) if right else (*positions, *ones)))

    def outer(self, a: Array, b: Array, q: Query) -> Array:
        """Multiply what each side has of its own, (n, *positions), for all pairs."""
        if a is None or b is None:
            return None
        left = self.spread(a, q, False, b.ndim - 1)
        return left * self.spread(b, q, True, a.ndim - 1)

    def variance(self, a: Node, side: int) -> jax.Array:
        """Give E A(x)^2 at every position, (n, *positions)."""
        found = self.second(a, a, Query(side, side, False, False))
        return jnp.zeros((1, *a.shape), self.dtype) if found is None else found

    def full(self, array: jax.Array, a: Node, b: Node, q: Query) -> jax.Array:
        """Give an array with all its positions."""
        batch = array.shape[: 1 + q.crossed]
        return jnp.broadcast_to(array, (*batch, *a.shape, *(b.shape if q.every else ())))

    def _move(self, node: Moved, array: Array, other: Node, q: Query, *, right: bool) -> Array:
        """Apply a map of positions to one side of all pairs."""
        if array is None:
            return None
        ends = (other, node.inner) if right else (node.inner, other)
        array = self.full(array, *ends, q)
        batch = array.shape[: 1 + q.crossed]
        shapes = [end.shape for end in ends]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if right:
            flat = array.reshape(*batch, sizes[0], *shapes[1])
        else:
            flat = array.reshape(*batch, *shapes[0], sizes[1])
        if node.mix is None:
            operation = node.operation
            inner = jax.vmap(operation) if right else jax.vmap(operation, -1, -1)
            for _ in batch:
                inner = jax.vmap(inner)
            out = inner(flat)
        else:
            out = self._mixed(node, flat, batch, q, right)
        new = (*shapes[0], *node.shape) if right else (*node.shape, *shapes[1])
        return out.reshape(*batch, *new)

    def _mixed(
        self, node: Moved, flat: jax.Array, batch: tuple[int, ...], q: Query, right: bool
    ) -> jax.Array:
        assert node.mix is not None
        matrix = node.mix.sides[q.right if right else q.left]
        inner = node.operation
        single = jax.vmap(inner, (0, None)) if right else jax.vmap(inner, (-1, None), -1)
        n = batch[1] if q.crossed and right else batch[0]
        matrix = jnp.broadcast_to(matrix, (max(n, matrix.shape[0]), *matrix.shape[1:]))
        if n == 1 and matrix.shape[0] > 1:
            size = (batch[0], matrix.shape[0]) if right and q.crossed else (matrix.shape[0],)
            flat = jnp.broadcast_to(flat, (*size, *flat.shape[len(size) :]))
        if not q.crossed:
            return jax.vmap(single)(flat, matrix)
        if right:
            return jax.vmap(jax.vmap(single), (0, None))(flat, matrix)
        return jax.vmap(jax.vmap(single, (0, None)))(flat, matrix)

    def _diagonal(self, array: Array, a: Node, b: Node, q: Query) -> Array:
        """Take every position with itself from all pairs of them."""
        if array is None:
            return None
        array = self.full(array, a, b, q._replace(every=True))
        batch, size = array.shape[: 1 + q.crossed], int(np.prod(a.shape))
        square = array.reshape(*batch, size, size)
        return jnp.diagonal(square, axis1=-2, axis2=-1).reshape(*batch, *a.shape)

    # --- linear nodes ---

    def _linear(self, a: Node, b: Node, q: Query, ask: Any, own: Any) -> Array:
        """Take linear nodes away, first of A and then of B; `ask` what is inside.

        `own` is what the weights of a `Scaled` add themselves.
        """
        match a, b:
            case Sum(), _:
                return add(*(ask(term, b, q) for term in a.terms))
            case _, Sum():
                return add(*(ask(a, term, q) for term in b.terms))
            case Times(), _:
                value = self.spread(a.value.sides[q.left], q, False, len(b.shape))
                return times(ask(a.inner, b, q), value)
            case _, Times():
                value = self.spread(b.value.sides[q.right], q, True, len(a.shape))
                return times(ask(a, b.inner, q), value)
            case Scaled(), _:
                value = self.spread(a.value.sides[q.left], q, False, len(b.shape))
                return add(times(ask(a.inner, b, q), value), own(a, b, q))
            case _, Scaled():
                value = self.spread(b.value.sides[q.right], q, True, len(a.shape))
                return times(ask(a, b.inner, q), value)
        return self._moved(a, b, q, ask)

    def _moved(self, a: Any, b: Any, q: Query, ask: Any) -> Array:
        if not q.every:
            alike = isinstance(a, Moved) and isinstance(b, Moved) and a.key == b.key
            if alike and a.selects and a.mix is None and b.mix is None:
                inner = ask(a.inner, b.inner, q)
                if inner is None:
                    return None
                inner = self.full(inner, a.inner, b.inner, q)
                operation = a.operation
                for _ in range(1 + q.crossed):
                    operation = jax.vmap(operation)
                return operation(inner)
            every = self._moved(a, b, q._replace(every=True), ask)
            return self._diagonal(every, a, b, q)
        if isinstance(a, Moved):
            return self._move(a, ask(a.inner, b, q), b, q, right=False)
        assert isinstance(b, Moved)
        return self._move(b, ask(a, b.inner, q), a, q, right=True)

    # --- second moments ---

    def _second(self, a: Node, b: Node, q: Query) -> Array:
        if not a.sources & b.sources:
            return self.outer(self.mean(a, q.left), self.mean(b, q.right), q)
        if isinstance(a, Source) and isinstance(b, Source):
            return self._source(a, b, q)[0]
        if _is_linear(a) or _is_linear(b):
            return self._linear(a, b, q, self.second, lambda *_: None)
        return self._expectation(a, b, q)

    def _mean(self, a: Node, side: int) -> Array:
        if a.gaussian:
            return None
        match a:
            case Deterministic():
                return a.value.sides[side]
            case Sum():
                return add(*(self.mean(term, side) for term in a.terms))
            case Times() | Scaled():
                return times(self.mean(a.inner, side), a.value.sides[side])
            case Moved():
                inner = self.mean(a.inner, side)
                if inner is None:
                    return None
                inner = jnp.broadcast_to(inner, (inner.shape[0], *a.inner.shape))
                if a.mix is None:
                    return jax.vmap(a.operation)(inner)
                matrix = a.mix.sides[side]
                n = max(len(matrix), len(inner))
                inner, matrix = (jnp.broadcast_to(v, (n, *v.shape[1:])) for v in (inner, matrix))
                return jax.vmap(a.operation)(inner, matrix)
        assert isinstance(a, Pointwise)
        first, last = a.arguments[0], a.arguments[-1]
        is_square = a.name in ("square", "integer_pow:2") or (a.name == "mul" and first is last)
        if is_square and isinstance(first, Sum | Moved) and not first.gaussian:
            return self.variance(first, side)  # as in a norm: of any field, mixed positions too
        factors = self._gate(a, a)
        if factors is not None:
            return times(self.mean(factors[0], side), self.mean(factors[1], side))
        profile = self.profile(a)
        return activations.mean(self, profile, side)

    def profile(self, a: Pointwise) -> Profile:
        """Give the function that a node is, of its Gaussian fields."""
        if a not in self._profiles:
            self._profiles[a] = profile_of(a)
        return self._profiles[a]

    def _gate(self, a: Any, b: Any) -> tuple[Node, Node, Node, Node] | None:
        """Give A = A1 A2 and B = B1 B2, where A1, B1 are independent of A2, B2."""
        if not (_is_gate(a) and _is_gate(b)):
            return None
        (a1, a2), (b1, b2) = a.arguments, b.arguments
        for c1, c2 in ((b1, b2), (b2, b1)):
            if not (a1.sources | c1.sources) & (a2.sources | c2.sources):
                return a1, a2, c1, c2
        return None

    def _expectation(self, a: Node, b: Node, q: Query) -> Array:
        gate = self._gate(a, b)
        if gate is not None:
            a1, a2, b1, b2 = gate
            return times(self.second(a1, b1, q), self.second(a2, b2, q))
        if isinstance(a, Pointwise) and isinstance(b, Pointwise):
            return activations.second(self, self.profile(a), self.profile(b), q)
        if isinstance(b, Pointwise):
            return self._with_field(a, b, q, flipped=False, ask=self.second)
        assert isinstance(a, Pointwise)
        return self._with_field(b, a, q, flipped=True, ask=self.second)

    def _with_field(self, z: Node, b: Pointwise, q: Query, *, flipped: bool, ask: Any) -> Array:
        """Compute E z(x) g(u') = sum_j c_j cov(z, u_j'), and E <dz(x), dg(u')>.

        Of derivatives c_j is E g_j(u'), with g_j as it is differentiated; of values it is the
        coefficient of the best linear fit of g, which the mean of a derivative is only where that
        is true, without jumps, stop_gradient or a rule of its own.
        """
        profile = self.profile(b)
        side = q.left if flipped else q.right
        if ask == self.tangent:
            count = len(profile.fields)
            slopes = [activations.mean(self, profile.derivative(j), side) for j in range(count)]
        else:
            slopes = activations.linear_fit(self, profile, side)
        total = None
        for field, slope in zip(profile.fields, slopes, strict=True):
            if slope is not None:
                inside = ask(field, z, q) if flipped else ask(z, field, q)
                total = add(total, times(inside, self.spread(slope, q, not flipped, len(z.shape))))
        return total

    # --- derivatives ---

    def _tangent(self, a: Node, b: Node, q: Query) -> Array:
        if not a.sources & b.sources:
            return None
        if isinstance(a, Source) and isinstance(b, Source):
            return self._source(a, b, q)[1]
        if _is_linear(a) or _is_linear(b):
            return self._linear(a, b, q, self.tangent, self._of_scales)
        gate = self._gate(a, b)
        if gate is not None:
            a1, a2, b1, b2 = gate
            return add(
                times(self.tangent(a1, b1, q), self.second(a2, b2, q)),
                times(self.second(a1, b1, q), self.tangent(a2, b2, q)),
            )
        if isinstance(a, Pointwise) and isinstance(b, Pointwise):
            return activations.tangent(self, self.profile(a), self.profile(b), q)
        z, g = (a, b) if isinstance(b, Pointwise) else (b, a)
        assert isinstance(g, Pointwise)
        if any(scales(u) for u in self.profile(g).fields):
            refuse(
                "a scale whose field enters beside its own activation",
                "add what has a product between",
            )
        return self._with_field(z, g, q, flipped=g is a, ask=self.tangent)

    def fixed(self, a: Node, b: Node, q: Query) -> Array:
        """Give E <dA, dB> without what the weights of `Scaled` add."""
        return self._once("fixed", a, b, q, self._fixed)

    def _fixed(self, a: Node, b: Node, q: Query) -> Array:
        if not a.sources & b.sources:
            return None
        if isinstance(a, Source) and isinstance(b, Source):
            return self._source(a, b, q)[1]
        return self._linear(a, b, q, self.fixed, lambda *_: None)

    def _of_scales(self, a: Scaled, b: Node, q: Query) -> Array:
        """Give what the weights of a scale add: their derivatives are the fields they multiply."""
        match b:
            case Sum():
                return add(*(self._of_scales(a, term, q) for term in b.terms))
            case Times():
                value = self.spread(b.value.sides[q.right], q, True, len(a.shape))
                return times(self._of_scales(a, b.inner, q), value)
            case Scaled():
                value = self.spread(b.value.sides[q.right], q, True, len(a.shape))
                total = times(self._of_scales(a, b.inner, q), value)
                if not np.intersect1d(b.pattern, a.pattern).size:
                    return total
                same = same_entries(a.pattern, b.pattern, q, self.dtype)
                return add(total, times(self.second(a.inner, b.inner, q), same))
            case Moved() if q.every or not (a.shape or b.inner.shape):
                return self._move(b, self._of_scales(a, b.inner, q), a, q, right=True)
            case Moved():
                every = q._replace(every=True)
                return self._diagonal(self._of_scales(a, b, every), a, b, q)
        return None

    # --- sources ---

    def _source(self, z: Source, other: Source, q: Query) -> tuple[Array, Array]:
        """Give the covariance of a source, perhaps at other positions, and of its derivatives."""
        key = ("source", z, other, q)
        if key not in self._known:
            self._known[key] = sources.covariance(self, z, other, q)
        return self._known[key]


def _is_linear(a: Node) -> bool:
    return isinstance(a, Sum | Times | Scaled | Moved)


def _is_gate(a: Node) -> bool:
    if not isinstance(a, Pointwise) or a.name != "mul" or len(a.arguments) != 2:
        return False
    return all(isinstance(b, Node) for b in a.arguments)
