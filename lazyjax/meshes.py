"""Calls inside a sharded program: arrays that live on a mesh, or on one device of it.

Inside `jax.shard_map` a function computes with what its device holds, and JAX follows which values
differ from device to device. To differentiate by a value that does not is to sum over the devices,
which no kernel is: every array of a call is made to vary alike, and what is added to it on the way
too. On a mesh with explicit axes every operation would have to say how its result is sharded; a
call runs on automatic axes of the same devices, and its results are given back on the explicit
ones.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from lazyjax.types import PyTree

Function = TypeVar("Function", bound=Callable[..., Any])


_alone: ContextVar[bool] = ContextVar("lazyjax_one_device", default=False)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Trace, inside the `with` block, what will run on one device, however many there are."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def may_be_shared_out() -> bool:
    """Tell whether what is traced may be shared out to several devices."""
    return jax.device_count() > 1 and not _alone.get()


def _arrays(tree: PyTree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _varying(tree: PyTree) -> frozenset[str]:
    """Give the axes of the mesh along which any leaf differs from device to device."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):  # values that are known do not
            kind = jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf
            kind = getattr(kind, "manual_axis_type", kind)  # since 0.10
            axes |= getattr(kind, "varying", getattr(kind, "vma", None)) or frozenset()
    return axes


def alike(tree: PyTree, reference: Any) -> Any:
    """Make every array of a tree vary over the devices as `reference` does.

    Parameters
    ----------
    tree : pytree
        Leaves that are no arrays are left as they are.
    reference : pytree

    Returns
    -------
    pytree
        The same values. Outside of `jax.shard_map` the tree itself.
    """
    axes = _varying(reference)
    if not axes:
        return tree

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _varying(leaf)))
        if not missing or not isinstance(leaf, jax.Array | np.ndarray | np.number | float):
            return leaf
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(leaf, missing, to="varying")
        return vars(jax.lax)["pvary"](leaf, missing)  # until 0.8.1

    return jax.tree.map(cast, tree)


def zeros(shape: tuple[int, ...], like: Any) -> jax.Array:
    """Make zeros of the dtype of an array, or of its `ShapeDtypeStruct`, that vary as it does."""
    return alike(jnp.zeros(shape, like.dtype), like)


def directions(y: jax.Array) -> jax.Array:
    """Give a cotangent for each of the outputs (K,) of an example, (K, K)."""
    return alike(jnp.eye(y.size, dtype=y.dtype), y)


def _on_the_mesh(leaf: Any) -> Any:
    """Make an array of one of NumPy; it lives on the mesh that is set."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _abstract(mesh: Any) -> Any:
    return mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh


def _automatic(mesh: Any) -> Any:
    """Give the same mesh, with automatic axes in the place of explicit ones."""
    kinds = tuple(AxisType.Auto if t == AxisType.Explicit else t for t in mesh.axis_types)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)


def _sharding(leaf: Any) -> NamedSharding | None:
    """Tell how an array, known or traced, is sharded over a mesh, if it is."""
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else leaf.sharding
    return sharding if isinstance(sharding, NamedSharding) else None


def _moved(tree: PyTree, here: Any, there: Any, rows: dict[int, Any]) -> Any:
    """Bring what lives on one mesh to another that differs by the kinds of its axes.

    A traced array on automatic axes does not say how it is sharded; if its first axis is as long as
    that of an array that came in, it is taken to be sharded alike.
    """

    def move(leaf: Any) -> Any:
        sharding = _sharding(leaf)
        if sharding is None:
            return leaf
        if isinstance(here, Mesh):  # nothing is traced
            own = sharding.mesh == here
            return jax.device_put(leaf, NamedSharding(there, sharding.spec)) if own else leaf
        if _abstract(sharding.mesh) != here:
            return leaf
        spec = PartitionSpec()
        if leaf.ndim and AxisType.Explicit in there.axis_types:
            spec = PartitionSpec(rows.get(leaf.shape[0]))
        return jax.sharding.reshard(leaf, NamedSharding(there, spec))

    return jax.tree.map(move, tree)


def in_any_program(back: bool = True) -> Callable[[Function], Function]:
    """Let a function be called inside `jax.shard_map`, and with arrays on explicit axes.

    Parameters
    ----------
    back : bool
        Whether its results are brought back to explicit axes.

    Returns
    -------
    callable
        From the function to one with the same arguments.
    """

    def decorator(function: Any) -> Any:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
                arguments = jax.tree.map(_on_the_mesh, arguments)
            arrays = _arrays((arguments, options))
            shardings = [s for s in map(_sharding, arrays) if s is not None]
            explicit = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
            if not explicit:
                return function(*alike(arguments, (arguments, options)), **options)
            traced = any(isinstance(array, Tracer) for array in arrays)
            mesh = _abstract(explicit[0]) if traced else explicit[0]
            automatic = _automatic(mesh)
            rows = {
                array.shape[0]: spec[0]
                for array in arrays
                if (own := _sharding(array)) and len(spec := own.spec) and spec[0] is not None
            }
            try:
                with use_abstract_mesh(_abstract(automatic)):
                    arguments, options = _moved((arguments, options), mesh, automatic, rows)
                    out = function(*alike(arguments, (arguments, options)), **options)
            except Exception as error:
                error.add_note(
                    f"The arrays are sharded over {mesh}. lazyjax computes on automatic axes of "
                    "its devices: f must name no explicit axes, and hold no arrays on them."
                )
                raise
            return _moved(out, automatic, mesh, rows) if back else out

        return call

    return decorator
