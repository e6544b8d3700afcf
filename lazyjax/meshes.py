"""Calls inside a sharded program: arrays that live on a mesh, or on one device of it.

Inside `jax.shard_map` a function computes with what its device holds, and JAX follows which values
differ from device to device. To differentiate by a value that does not is to sum over the devices,
which no kernel is: every array of a call is made to vary alike, and what is added to it on the way
too. On a mesh with explicit axes every operation would have to say how its result is sharded; a
call runs on automatic axes of the same devices, and its results are given back on the explicit
ones.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.sharding import use_abstract_mesh as within

Function = TypeVar("Function", bound=Callable[..., Any])


def _arrays(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _varying(tree: Any) -> frozenset[str]:
    """Give the axes of the mesh along which any leaf differs from device to device."""
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            kind = jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf
            kind = getattr(kind, "manual_axis_type", kind)  # since 0.10
            axes |= getattr(kind, "varying", getattr(kind, "vma", None)) or frozenset()
    return axes


def alike(tree: Any, reference: Any) -> Any:
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
        return jax.lax.pvary(leaf, missing)  # until 0.8.1

    return jax.tree.map(cast, tree)


def zeros(shape: tuple[int, ...], like: Any) -> jax.Array:
    """Make zeros of the dtype of an array, or of its `ShapeDtypeStruct`, that vary as it does."""
    return alike(jnp.zeros(shape, like.dtype), like)


def directions(y: jax.Array) -> jax.Array:
    """Give a cotangent for each of the outputs (K,) of an example, (K, K)."""
    return alike(jnp.eye(y.size, dtype=y.dtype), y)


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _explicit(tree: Any) -> Any:
    """Give the mesh with explicit axes that arrays live on, None if there is none."""
    for leaf in _arrays(tree):
        sharding = leaf.sharding if not isinstance(leaf, Tracer) else jax.typeof(leaf).sharding
        if isinstance(sharding, NamedSharding) and _is_explicit(sharding.mesh):
            return sharding.mesh
    return None


def _automatic(mesh: Mesh) -> Mesh:
    """Give the same mesh, with automatic axes in the place of explicit ones."""
    kinds = tuple(AxisType.Auto if t == AxisType.Explicit else t for t in mesh.axis_types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def first_axis(x: Any) -> PartitionSpec:
    """Tell how the examples of a batch are sharded over explicit axes, if they are."""
    for leaf in _arrays(x):
        spec = jax.typeof(leaf).sharding.spec
        if len(spec) and spec[0] is not None:
            return PartitionSpec(spec[0])
    return PartitionSpec()


def in_any_program(spec: Callable[..., PartitionSpec]) -> Callable[[Function], Function]:
    """Let a function be called inside `jax.shard_map` and with arrays on explicit axes.

    Parameters
    ----------
    spec : callable
        Of the arguments: how results of a traced call are sharded over explicit axes.

    Returns
    -------
    callable
        Of the function, to the function.
    """

    def decorator(function: Any) -> Any:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            mesh = _explicit((arguments, options))
            if mesh is None:
                return function(*alike(arguments, (arguments, options)), **options)
            if any(isinstance(leaf, Tracer) for leaf in _arrays((arguments, options))):
                return _traced(function, arguments, options, NamedSharding(mesh, spec(*arguments)))
            return _called(function, arguments, options, mesh)

        return call

    return decorator


def _called(function: Any, arguments: Any, options: Any, mesh: Mesh) -> Any:
    """Call a function on automatic axes; give its results on the explicit ones."""
    automatic = _automatic(mesh)

    def moved(tree: Any, here: Mesh, there: Mesh) -> Any:
        def move(leaf: Any) -> Any:
            sharding = getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and sharding.mesh == here:
                return jax.device_put(leaf, NamedSharding(there, sharding.spec))
            return leaf

        return jax.tree.map(move, tree)

    with within(automatic.abstract_mesh):
        arguments, options = moved((arguments, options), mesh, automatic)
        out = function(*arguments, **options)
    return moved(out, automatic, mesh)


def _traced(function: Any, arguments: Any, options: Any, spec: NamedSharding) -> Any:
    """Trace a function on automatic axes, with results that are sharded as `spec` says."""
    leaves, structure = jax.tree.flatten((arguments, options))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_arrays(*arrays: Any) -> Any:
        new = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            new[i] = array
        arguments, options = structure.unflatten(new)
        return function(*arguments, **options)

    return jax.sharding.auto_axes(of_arrays, out_sharding=spec)(*[leaves[i] for i in places])
