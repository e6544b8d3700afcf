"""A kernel on the disk: opened lazily, read in parts, multiplied tile by tile."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lazyjax.operators import KernelOperator, operator
from lazyjax.store import files


def _index(key: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Turn an index of numpy into one without negative numbers and open ends."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if sum(k is Ellipsis for k in keys) == 1:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(shape) - len(keys) + 1)
    if len(keys) > len(shape):
        raise IndexError(
            f"an index of a kernel must have at most {len(shape)} parts, got {len(keys)}. "
            f"Its shape is {shape}."
        )
    parts = []
    for k, size in zip(keys, shape, strict=False):
        if isinstance(k, slice):
            whole = range(*k.indices(size))
            forward = whole.step > 0 and len(whole)
            k = slice(whole.start, whole.stop, whole.step) if forward else np.asarray(whole, int)
        else:
            k = np.asarray(k)
            if k.dtype == bool and k.shape == (size,):
                k = np.flatnonzero(k)
            if not np.issubdtype(k.dtype, np.integer) or np.any((k < -size) | (k >= size)):
                raise IndexError(
                    f"an index of a kernel must be whole numbers from {-size} to {size - 1}, a "
                    f"slice or a mask of {size}, got {k}. Its shape is {shape}."
                )
            k = np.where(k < 0, k + size, k)
        parts.append(k)
    return tuple(parts)


@dataclass(frozen=True)
class StoredKernel:
    """A finished kernel on the disk; made by `kernel_store` or `open_kernel`.

    `K[:100, [3, 5]]` reads a part, `np.asarray(K)` all of it. The folder is a zarr array of version
    3, which `zarr.open(path)` opens too.

    Attributes
    ----------
    path : str
    shape : tuple of int
        As that of `ntk`: (N1, N2, *out, *out), (N1, N2, *out) or (N1, N2).
    dtype : numpy dtype
    outputs : int
        Rows that an example has in the matrix view: K, or 1 where outputs are summed over.
    recipe : dict
        What was computed, from what, and how.
    """

    path: str
    shape: tuple[int, ...] = field(compare=False)
    dtype: np.dtype = field(compare=False)
    outputs: int = field(compare=False)
    recipe: dict[str, Any] = field(compare=False, repr=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read a part, indexed as in numpy: by slices, whole numbers and arrays of them."""
        index = _index(key, self.shape)
        return np.asarray(files.open_array(Path(self.path))[index].read().result())

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Read all of it."""
        if copy is False:
            raise ValueError("`copy` must not be False for a kernel on the disk. Use None.")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    # --- the matrix view, row n K + k as in `matrix` ---

    def product(self, v: np.ndarray) -> np.ndarray:
        """Multiply by a block of vectors, tile by tile.

        Parameters
        ----------
        v : (N2 K, B)

        Returns
        -------
        (N1 K, B)

        Raises
        ------
        ValueError
            If the shapes do not fit, or the kernel has reduce="diagonal".
        """
        return self._product(v, 0)

    def transposed_product(self, v: np.ndarray) -> np.ndarray:
        """Multiply the transposed kernel by a block (N1 K, B), as `product`; gives (N2 K, B)."""
        return self._product(v, 1)

    def rows(self, examples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Read the rows of some examples.

        Parameters
        ----------
        examples : ints
            From 0 to N1 - 1, in any order.

        Returns
        -------
        (len(examples) K, N2 K)

        Raises
        ------
        ValueError
            If they are no examples of x1, or the kernel has reduce="diagonal".
        """
        self._require_matrix()
        wanted = np.asarray(examples)
        n1, n2 = self.shape[:2]
        whole = np.issubdtype(wanted.dtype, np.integer) or not wanted.size
        if wanted.ndim != 1 or not whole or np.any((wanted < 0) | (wanted >= n1)):
            raise ValueError(
                f"`examples` must be a list of whole numbers from 0 to {n1 - 1}, got {examples}. "
                "Drop the others."
            )
        wanted, k = wanted.astype(int), self.outputs
        chosen = np.empty((len(wanted), k, n2 * k), self.dtype)
        for rows, columns, tile in self._tiles():
            mine = np.flatnonzero((wanted >= rows.start) & (wanted < rows.stop))
            if mine.size:
                part = _matrix(tile[wanted[mine] - rows.start], k)
                at = slice(columns.start * k, columns.stop * k)
                chosen[mine, :, at] = part.reshape(len(mine), k, -1)
        return chosen.reshape(len(wanted) * k, n2 * k)

    def operator(self, *, ridge: ArrayLike = 0.0) -> KernelOperator:
        """Take the kernel as an operator, for solves, eigenpairs, traces and regression.

        Parameters
        ----------
        ridge : float
            0 or more, in the units of the kernel; only without x2.

        Returns
        -------
        KernelOperator
            Each product reads the kernel from the disk once, on the host, for all its vectors.

        Raises
        ------
        ValueError
            If the kernel has reduce="diagonal", or the ridge is added to a kernel that is not
            square.
        """
        self._require_matrix()
        n, m = (size * self.outputs for size in self.shape[:2])
        kernel = operator(
            _OnHost(self, "product", n),
            _OnHost(self, "transposed_product", m),
            rows=_OnHost(self, "rows", m),
            shape=(n, m),
            dtype=self.dtype,
            outputs=self.outputs,
            psd=self.recipe["x2"] is None,
        )
        return kernel + ridge if np.any(ridge) else kernel

    def _product(self, v: np.ndarray, side: int) -> np.ndarray:
        self._require_matrix()
        n, m = (self.shape[axis] * self.outputs for axis in (side, 1 - side))
        v = np.asarray(v)
        if v.ndim != 2 or len(v) != m:
            raise ValueError(
                f"`v` must have shape ({m}, B), got {v.shape}. Use v[:, None] for one vector."
            )
        product = np.zeros((n, v.shape[1]), np.result_type(self.dtype, v.dtype))
        for rows, columns, tile in self._tiles():
            to, of = (
                slice(part.start * self.outputs, part.stop * self.outputs)
                for part in ((rows, columns) if side == 0 else (columns, rows))
            )
            block = _matrix(tile, self.outputs)
            product[to] += (block if side == 0 else block.T) @ v[of]
        return product

    def _require_matrix(self) -> None:
        if self.recipe["reduce"] == "diagonal":
            raise ValueError(
                '`reduce` must not be "diagonal" for a kernel that is used as a matrix: it has no '
                'K x K outputs. Store it with "none", "trace" or "sum".'
            )

    def _tiles(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Give the tiles one after the other: their examples, and the chunk, mapped from disk."""
        rows, columns = self.recipe["tile"]
        n1, n2 = self.shape[:2]
        for i in range(-(-n1 // rows)):
            for j in range(-(-n2 // columns)):
                file = files.chunk(Path(self.path), i, j, len(self.shape))
                part = slice(i * rows, min((i + 1) * rows, n1))
                other = slice(j * columns, min((j + 1) * columns, n2))
                shape = (rows, columns, *self.shape[2:])
                tile = np.memmap(file, self.dtype, mode="r", shape=shape)
                yield part, other, tile[: part.stop - part.start, : other.stop - other.start]


class _OnHost(NamedTuple):
    """A method of a stored kernel as a function that JAX can trace; equal ones compile once."""

    kernel: StoredKernel
    name: str
    size: int

    def __call__(self, argument: jax.Array) -> jax.Array:
        count = len(argument) * self.kernel.outputs
        shape = (count, self.size) if self.name == "rows" else (self.size, argument.shape[1])
        return jax.pure_callback(
            lambda a: getattr(self.kernel, self.name)(np.asarray(a)),
            jax.ShapeDtypeStruct(shape, self.kernel.dtype),
            argument,
            vmap_method="sequential",
        )


def _matrix(tile: np.ndarray, k: int) -> np.ndarray:
    """Give (n, m, *out, *out) as (n k, m k)."""
    n, m = tile.shape[:2]
    return tile.reshape(n, m, k, k).transpose(0, 2, 1, 3).reshape(n * k, m * k)


def open_kernel(path: str | PathLike[str]) -> StoredKernel:
    """Open a kernel that `kernel_store` has finished; nothing is read yet.

    Parameters
    ----------
    path : path

    Returns
    -------
    StoredKernel

    Raises
    ------
    FileNotFoundError
        If there is no stored kernel.
    ValueError
        If it is not finished.
    """
    folder = Path(path)
    recipe = files.read_json(folder / files.RECIPE)
    if recipe is None:
        raise FileNotFoundError(
            f"`path` must be a stored kernel, got {path}. Store one there: kernel_store(f, params, "
            "x, path=..., memory=...)."
        )
    if not (folder / files.DONE).exists():
        raise ValueError(
            f"`path` must be a finished kernel, got {path}, which is not. Call kernel_store with "
            "the arguments of the first time: it goes on where it was."
        )
    shape, dtype = tuple(recipe["shape"]), jnp.dtype(recipe["dtype"])
    return StoredKernel(str(folder.absolute()), shape, dtype, recipe["rows"], recipe)
