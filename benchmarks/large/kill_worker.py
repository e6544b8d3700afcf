"""Store a kernel, and log each tile that is computed: `kill_worker N MEMORY FOLDER LOG`."""

import sys

from benchmarks.large.case import draw
from lazyjax import costs
from lazyjax.store import kernel_store, workers

COMPUTE = workers.compute_tile


def main(n: int, memory: str, path: str, log: str) -> None:
    def logged(*arguments):
        with open(log, "a") as file:
            file.write("tile\n")
        return COMPUTE(*arguments)

    workers.compute_tile = logged
    # as on a disk so fast that features are spilled: their files are interrupted too
    costs.RATES["cpu"] = costs.RATES["cpu"]._replace(disk=1e12)
    options = {"reduce": "none", "outputs": (0, 1, 2, 3), "tile": n // 12}
    kernel_store(*draw(n), path=path, memory=memory, verify=False, **options)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
