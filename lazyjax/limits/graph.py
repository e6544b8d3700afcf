"""How the nodes of a network are made: each once, and in the simplest form there is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.limits.nodes import (
    Deterministic,
    Entries,
    Known,
    Moved,
    Node,
    Pointwise,
    Scaled,
    Source,
    Sum,
    Times,
    now,
    product_of,
)


def _all_sources(nodes: Any) -> frozenset[int]:
    return frozenset().union(*(n.sources for n in nodes if isinstance(n, Node)))


class Graph:
    """Makes the nodes of one network, the same one for the same request."""

    def __init__(self) -> None:
        self._made: dict[Any, Node] = {}
        self._held: list[Any] = []  # what keys name by identity
        self._selected: dict[int, tuple[Node, Any, Any]] = {}  # of which node, and how

    def _once(self, key: Any, make: Callable[[], Node], *held: Any) -> Node:
        if key not in self._made:
            self._made[key] = make()
            self._held += held
        return self._made[key]

    def sum(self, *nodes: Node) -> Node:
        """Add fields."""
        loose: list[Node] = []
        for node in nodes:
            loose += node.terms if isinstance(node, Sum) and not node.gaussian else [node]
        fields = [node for node in loose if node.gaussian]
        terms = [node for node in loose if not node.gaussian]
        # all that is Gaussian is one field
        terms = [self.sum(*fields), *terms] if fields and terms else fields or terms
        if len(terms) == 1:
            return terms[0]
        key = ("sum", *map(id, terms))
        return self._once(
            key,
            lambda: Sum(
                terms[0].shape,
                tuple(terms),
                sources=_all_sources(terms),
                gaussian=all(t.gaussian for t in terms),
            ),
            *terms,
        )

    def times(self, node: Node, value: Known) -> Node:
        """Multiply by what is not random."""
        if isinstance(node, Sum) and not node.gaussian:  # a Gaussian one stays one field
            return self.sum(*(self.times(term, value) for term in node.terms))
        if isinstance(node, Deterministic):
            return Deterministic(node.shape, product_of(node.value, value))
        key = ("times", id(node), id(value))
        return self._once(
            key,
            lambda: Times(node.shape, node, value, sources=node.sources, gaussian=node.gaussian),
            node,
            value,
        )

    def scaled(self, node: Node, value: Known, pattern: np.ndarray) -> Node:
        """Multiply by weights that are not random."""
        return Scaled(
            node.shape, node, value, pattern, sources=node.sources, gaussian=node.gaussian
        )

    def pointwise(self, name: str, function: Callable[..., jax.Array], arguments: Any) -> Node:
        """Apply a function, entry by entry."""
        shape = next(a.shape for a in arguments if isinstance(a, Node))
        return Pointwise(shape, tuple(arguments), function, name, sources=_all_sources(arguments))

    def moved(
        self,
        node: Node,
        operation: Callable[..., jax.Array],
        shape: tuple[int, ...],
        key: Any,
        *,
        selects: bool = False,
        fills: bool = False,
        mix: Known | None = None,
    ) -> Node:
        """Apply a linear map of positions: to the fields inside, where that is the same.

        A map that selects positions, without filling any, goes through everything to the sources.
        """
        options = {"selects": selects, "fills": fills, "mix": mix}
        new = self._moved(node, operation, shape, key, **options)
        if selects and not fills and id(new) not in self._selected:
            base, first, name = self._selected.get(id(node), (node, None, ()))
            both = operation if first is None else lambda a: operation(first(a))
            self._selected[id(new)] = (base, both, (*name, key))
            self._held += [node, new]
        return new

    def from_one(
        self, groups: list[tuple[tuple[int, Node], ...]]
    ) -> tuple[tuple[tuple[int, Node], ...], list[Any], Any] | None:
        """Give what all of some fields are selections of, and how; None if they differ."""
        found = [
            [self._selected.get(id(node), (node, lambda a: a, ())) for _, node in parts]
            for parts in groups
        ]
        bases = {tuple(id(base) for base, _, _ in each) for each in found}
        if len(bases) > 1:
            return None
        base = tuple(
            (count, node) for (count, _), (node, _, _) in zip(groups[0], found[0], strict=True)
        )
        keys = tuple(each[0][2] for each in found)
        return base, [each[0][1] for each in found], keys

    def _moved(
        self,
        node: Node,
        operation: Callable[..., jax.Array],
        shape: tuple[int, ...],
        key: Any,
        *,
        selects: bool,
        fills: bool,
        mix: Known | None,
    ) -> Node:

        def through(inner: Node) -> Node:
            return self.moved(inner, operation, shape, key, selects=selects, fills=fills, mix=mix)

        def known(value: Known) -> Known:
            def one(side: jax.Array) -> jax.Array:
                def whole(side: Any) -> jax.Array:
                    return jnp.broadcast_to(side, (side.shape[0], *node.shape))

                return now(lambda a: jax.vmap(operation)(whole(a)), side)

            return value.map(one)

        if isinstance(node, Sum):
            return self.sum(*map(through, node.terms))
        if isinstance(node, Deterministic) and mix is None:
            return Deterministic(shape, known(node.value))
        name = ("moved", id(node), key, id(mix))
        if selects and not fills:
            match node:
                case Entries():
                    pattern = now(operation, node.pattern)
                    factor = known(node.factor)
                    own = {"sources": node.sources, "gaussian": True}
                    return self._once(
                        name,
                        lambda: Entries(shape, node.part, pattern, node.variance, factor, **own),
                        node,
                    )
                case Times():
                    return self._once(
                        name, lambda: self.times(through(node.inner), known(node.value)), node
                    )
                case Scaled():
                    pattern = now(operation, node.pattern)
                    return self._once(
                        name,
                        lambda: self.scaled(through(node.inner), known(node.value), pattern),
                        node,
                    )
                case Pointwise():
                    return self._once(
                        name,
                        lambda: self.pointwise(
                            node.name,
                            node.function,
                            [
                                through(a) if isinstance(a, Node) else known(a)
                                for a in node.arguments
                            ],
                        ),
                        node,
                    )
                case Moved() if node.selects and node.mix is None:
                    inner = node.operation
                    return self.moved(
                        node.inner,
                        lambda a: operation(inner(a)),
                        shape,
                        (node.key, key),
                        selects=True,
                        fills=True,
                    )
        return self._once(
            name,
            lambda: Moved(
                shape,
                node,
                operation,
                key,
                selects,
                mix,
                sources=node.sources,
                gaussian=node.gaussian,
            ),
            node,
            mix,
        )

    def restrict(self, node: Node, part: tuple[Any, ...]) -> Node:
        """Give some of the channels: other ones are independent of these."""
        inner = partial(self.restrict, part=part)
        name = ("part", id(node), part)

        def make() -> Node:
            match node:
                case Deterministic():
                    return node
                case Source():
                    return node.of((*node.part, part))
                case Sum():
                    return self.sum(*map(inner, node.terms))
                case Times():
                    return self.times(inner(node.inner), node.value)
                case Scaled():
                    return self.scaled(inner(node.inner), node.value, node.pattern)
                case Moved():
                    return self.moved(
                        inner(node.inner),
                        node.operation,
                        node.shape,
                        node.key,
                        selects=node.selects,
                        fills=True,
                        mix=node.mix,
                    )
                case Pointwise():
                    return self.pointwise(
                        node.name,
                        node.function,
                        [inner(a) if isinstance(a, Node) else a for a in node.arguments],
                    )
            raise AssertionError(node)

        return self._once(name, make, node)
