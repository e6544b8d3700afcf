"""Trees of arrays and histories on disk, written whole or not at all.

A file is written under another name in the same folder, flushed to the disk and renamed: a reader
meets the old file or the new one. It is an npz archive, which holds a checksum of every array. The
same arrays give the same bytes.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.types import History, Params, leaf_names

_ABOUT = "about"  # the entry that tells what the file holds; leaves are leaf/<path>


def write_whole(path: str | PathLike[str], *content: bytes | memoryview) -> None:
    """Write a file whole or not at all: under another name, flushed, then renamed.

    Parameters
    ----------
    path : path
        Its folder must exist.
    *content : bytes or memoryview
        Written one after the other.

    Raises
    ------
    OSError
        If the folder is missing or cannot be written; the file is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Put named arrays into an npz archive: the same arrays give the same bytes.

    Parameters
    ----------
    arrays : mapping of str to array

    Returns
    -------
    bytes
        What `numpy.load` reads. `numpy.savez` would do but for the time of day in its entries.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(arrays[name]), allow_pickle=False)
    return buffer.getvalue()


def unpack(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """Read the named arrays of an npz archive, checksums verified.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str to array

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is broken.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a saved file, got {path}. Save one there first.")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError) as error:
        raise ValueError(
            f"`path` must be a whole file of saved arrays, got a broken one: {path} ({error}). "
            "Delete it and save again."
        ) from error


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _to_numpy(leaf: Any) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    # numpy cannot write the dtypes it does not own (bfloat16): their bytes go instead
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")


def _from_numpy(array: np.ndarray, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    dtype = np.dtype(jnp.result_type(like))
    return array if dtype.isbuiltin == 1 else array.view(dtype)


def save_tree(path: str | PathLike[str], tree: Params, *, about: str = "parameters") -> None:
    """Save a pytree of arrays, such as the parameters of a trained network.

    Parameters
    ----------
    path : path
        The file; its folder must exist.
    tree : pytree of arrays
        Of any dtypes, random keys included.
    about : str
        What the file holds; `load_tree` asks for the same.

    Raises
    ------
    OSError
        If the folder is missing or cannot be written.
    ValueError
        If two leaves have the same path.
    """
    write_whole(path, pack({**_leaves(tree), _ABOUT: np.array(about)}))


def _leaves(tree: Params) -> dict[str, np.ndarray]:
    names = [f"leaf/{name}" for name in leaf_names(tree)]
    arrays = dict(zip(names, map(_to_numpy, jax.tree.leaves(tree)), strict=True))
    if len(arrays) < len(names):
        raise ValueError(f"`tree` must have one path a leaf, got {names}. Rename the twins.")
    return arrays


def what_is(path: str | PathLike[str]) -> str:
    """Tell what a saved file holds: the `about` it was saved with.

    Parameters
    ----------
    path : path

    Returns
    -------
    str

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is broken.
    """
    return str(unpack(path).get(_ABOUT, "arrays of another origin"))


def _open(path: str | PathLike[str], about: str) -> dict[str, np.ndarray]:
    arrays = unpack(path)
    held = str(arrays.pop(_ABOUT, "arrays of another origin"))
    if held != about:
        raise ValueError(f"`path` must hold {about}, got a file of {held}. Pass the right file.")
    return arrays


def _fit(arrays: Mapping[str, np.ndarray], like: Params, *, leading: int = 0) -> Params:
    """Put the leaves into the structure of `like`; the file may have `leading` axes more."""
    names = [f"leaf/{name}" for name in leaf_names(like)]
    held = {name for name in arrays if name.startswith("leaf/")}
    if set(names) != held:
        strange = sorted(name.removeprefix("leaf/") for name in set(names) ^ held)
        raise ValueError(
            f"`like` must have the leaves of the file, got a tree that differs in {strange}. "
            "Pass parameters of the same model."
        )
    leaves = []
    for name, leaf in zip(names, jax.tree.leaves(like), strict=True):
        loaded = _from_numpy(arrays[name], leaf)
        if np.shape(loaded)[leading:] != np.shape(leaf):
            raise ValueError(
                f"`like` must have shape {np.shape(loaded)[leading:]} at "
                f"{name.removeprefix('leaf/')}, got {np.shape(leaf)}. "
                "Pass parameters of the same model."
            )
        leaves.append(loaded)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_tree(path: str | PathLike[str], like: Params, *, about: str = "parameters") -> Params:
    """Load what `save_tree` wrote.

    Parameters
    ----------
    path : path
    like : pytree
        A tree of the same structure and shapes, such as freshly initialised parameters.
    about : str
        What the file is to hold.

    Returns
    -------
    pytree of numpy arrays
        With the structure of `like` and the dtypes of the file; random keys are keys again.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is broken, holds something else, or does not fit `like`.
    """
    return _fit(_open(path, about), like)


_CURVES = ("loss", "weight_movement", "steps", "data_loss")


def save_history(path: str | PathLike[str], history: History) -> None:
    """Save a history, of one run or of an ensemble.

    Parameters
    ----------
    path : path
        The file; its folder must exist.
    history : History

    Raises
    ------
    OSError
        If the folder is missing or cannot be written.
    """
    arrays = {name: getattr(history, name) for name in _CURVES}
    arrays |= {f"layer/{name}": curve for name, curve in history.layer_movement.items()}
    arrays |= _leaves(history.params)
    facts = {"relative_to_all": history.relative_to_all, "diverged_at": history.diverged_at}
    write_whole(
        path, pack({**arrays, "facts": np.array(json.dumps(facts)), _ABOUT: np.array("history")})
    )


def load_history(path: str | PathLike[str], like: Params) -> History:
    """Load what `save_history` wrote.

    Parameters
    ----------
    path : path
    like : pytree
        The parameters of one member at one step, such as freshly initialised ones.

    Returns
    -------
    History

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is broken, holds something else, or does not fit `like`.
    """
    arrays = _open(path, "history")
    facts = json.loads(str(arrays["facts"]))
    diverged_at = facts["diverged_at"]
    ensemble = arrays["loss"].ndim == 2
    layers = {
        name.removeprefix("layer/"): curve
        for name, curve in arrays.items()
        if name.startswith("layer/")
    }
    return History(
        layer_movement={name: layers[name] for name in leaf_names(like) if name in layers},
        relative_to_all=tuple(facts["relative_to_all"]),
        params=_fit(arrays, like, leading=1 + ensemble),
        diverged_at=tuple(diverged_at) if ensemble else diverged_at,
        **{name: arrays[name] for name in _CURVES},
    )


def fingerprint(*parts: Any) -> str:
    """Give the SHA-256 of strings and of trees of arrays: what a checkpoint is compared by.

    Parameters
    ----------
    *parts : str or pytree of arrays

    Returns
    -------
    str
        64 hexadecimal digits; structures, names, shapes, dtypes and values count.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        digest.update(str(leaf_names(part)).encode())
        for leaf in map(_to_numpy, jax.tree.leaves(part)):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
