"""What does `compare` cost beside the two trainings alone? `python -m benchmarks.compare`

Each side in a fresh process, the two trainings and then `compare`, compilation included; then both
again without it, in the same processes. Memory is the largest that the process ever held.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

import lazyjax
from benchmarks.compare.cases import CASES

MEMORY = "1GiB"


def _trainings(case: Any) -> None:
    options = dict(case.options)
    key = options.pop("key", None)
    for model in (case.f, lazyjax.linearize(case.f, case.params)):
        own = None if key is None else jax.random.clone(key)
        lazyjax.train(model, case.params, case.data, case.optimizer, key=own, **options)


def measure(side: str, name: str, steps: int, again: bool) -> dict[str, Any]:
    """Time one side of one case, the first call and perhaps a second."""
    case, seconds, compared = CASES[name](steps), [], None
    for _ in range(1 + again):
        begin = time.perf_counter()
        if side == "trainings":
            _trainings(case)
        else:
            options = dict(case.options)
            if "key" in options:
                options["key"] = jax.random.clone(options["key"])
            compared = lazyjax.compare(
                case.f, case.params, case.data, case.optimizer, memory=MEMORY, **options
            )
        seconds.append(time.perf_counter() - begin)
    found = {"seconds": seconds, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if compared is not None:
        found["kernels"] = compared.kernels.shape
        found["outputs"] = compared.network.train.shape
        found["closed form"] = compared.no_closed_form or "yes"
    return found


def main(
    only: str | None = None,
    side: str | None = None,
    steps: int = 100,
    again: bool = True,
    quick: bool = False,
) -> None:
    """Print the table.

    Parameters
    ----------
    only
        one case: digits or resnet
    side
        measure here: trainings or compare, and print JSON
    steps
        of each training
    again
        whether to time a second call, without compilation
    quick
        the digits alone, few steps, once
    """
    if side is not None:
        print(json.dumps(measure(side, only or "digits", steps, again)))
        return
    if quick:
        only, steps, again = "digits", 10, False
    table = Table(title=f"compare and the two trainings alone, {steps} steps, memory={MEMORY}")
    for head in ("case", "", "trainings s", "compare s", "ratio", "MB", "MB", "kernels", "outputs"):
        table.add_column(head)
    for name in [only] if only else CASES:
        command = [
            sys.executable,
            "-m",
            "benchmarks.compare",
            "--only",
            name,
            "--steps",
            str(steps),
        ]
        command += [] if again else ["--no-again"]
        two, one = (
            json.loads(
                subprocess.run(
                    [*command, "--side", own], check=True, stdout=subprocess.PIPE
                ).stdout.splitlines()[-1]
            )
            for own in ("trainings", "compare")
        )
        for call, a, b in zip(
            ("first call", "again"), two["seconds"], one["seconds"], strict=False
        ):
            row = (name, call, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}")
            sizes = (f"{two['MB']:.0f}", f"{one['MB']:.0f}")
            table.add_row(*row, *sizes, str(one["kernels"]), str(one["outputs"]))
        Console(width=140).print(f"{name}: closed form: {one['closed form']}")
    Console(width=140).print(table)


if __name__ == "__main__":
    tyro.cli(main)
