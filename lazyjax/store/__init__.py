"""Kernels that are larger than memory, on the disk: written tile by tile, read lazily."""

from lazyjax.store.building import kernel_store
from lazyjax.store.stored import StoredKernel, open_kernel

__all__ = ["StoredKernel", "kernel_store", "open_kernel"]
