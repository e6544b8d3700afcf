"""Kernels that are larger than memory, on the disk: written tile by tile, read lazily.

`building` is the entrance, `kernel_store`: what was asked for (`recipe`) becomes a schedule of
tiles (`panels`) and compiled code for a block and for a tile (`programs`). `workers` go through the
tiles and leave out those that are there, so that what was killed goes on; `files` knows what is on
the disk, and when it is whole. `stored` reads.
"""

from lazyjax.store.building import kernel_store
from lazyjax.store.stored import StoredKernel, open_kernel

__all__ = ["StoredKernel", "kernel_store", "open_kernel"]
