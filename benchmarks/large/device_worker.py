"""Store a kernel with all devices there are: `device_worker N DTYPE FOLDER [PROCESS PORT]`."""

import sys

import jax


def main(n: int, dtype: str, path: str, process: str = "", port: str = "") -> None:
    jax.config.update("jax_enable_x64", dtype == "float64")
    if process:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    from benchmarks.large.case import draw  # after the processes have found each other
    from lazyjax import costs
    from lazyjax.store import kernel_store

    # as on a disk so fast that features are spilled: then devices read each other's
    costs.RATES["cpu"] = costs.RATES["cpu"]._replace(disk=1e12)
    memory = n * 2**15 * jax.numpy.dtype(dtype).itemsize * 2
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    options = {"method": "structured_derivatives", "reduce": "trace", "tile": n // 12}
    stored = kernel_store(
        *draw(n, dtype), path=path, memory=memory, mesh=mesh, verify=False, **options
    )
    assert stored.recipe["spilled"]


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
