"""Kernels that are larger than memory, on the disk: written tile by tile, read lazily."""

from lazyjax.store.stored import StoredKernel, open_kernel
from lazyjax.store.writing import kernel_store

__all__ = ["StoredKernel", "kernel_store", "open_kernel"]
