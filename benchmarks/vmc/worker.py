"""The worker's end of the line: a process that takes one step when it is asked to.

One JSON object a line. The first is the task; it is answered when the step has been taken once, in
float32, and its update saved to `task["single"]`. Then `{"do": ...}`:
    call   -> {"seconds", "MB"}    MB: the most that the process has held
    double -> {}                   the update of some samples in float64, to a file
The answer to a failure is {"error": ...}. Needs jax and numpy alone.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from benchmarks.vmc.cases import CASES, Case, read

Step = Callable[[Any, Any, Any], Any]  # (params, x, energies) -> update, compiled when called
Make = Callable[[Case, dict[str, Any]], Step]


def _save(file: str, update: dict[str, Any]) -> None:
    np.save(file, np.concatenate([np.ravel(update[name]) for name in sorted(update)]))


def _double(make: Make, task: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    jax.config.update("jax_enable_x64", True)
    params, x, energies = read(task["data"], np.float64)
    step, n = make(CASES[task["case"]], task), request["samples"]
    _save(request["file"], step(params, x[:n], energies[:n]))
    return {}


def _answers(
    make: Make, task: dict[str, Any], versions: str
) -> Generator[dict[str, Any], dict[str, Any], None]:
    """Give one answer after the other; what is sent in is the next request."""
    jax.config.update("jax_enable_x64", False)
    arguments = jax.device_put(tuple(read(task["data"], np.float32)))
    step = make(CASES[task["case"]], task)
    begin = time.perf_counter()
    update = jax.block_until_ready(step(*arguments))
    answer = {"first": time.perf_counter() - begin, "versions": versions}
    _save(task["single"], update)
    del update
    while True:
        request = yield answer
        if request["do"] == "double":
            answer = _double(make, task, request)
            continue
        begin = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        seconds = time.perf_counter() - begin
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = {"seconds": seconds, "MB": most / (2**20 if sys.platform == "darwin" else 2**10)}


def serve(make: Make, versions: str) -> None:
    """Answer until the line closes; what takes longer than `task["limit"]` ends the process."""
    answered = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answers, limit = None, 0
    for line in sys.stdin:
        request = json.loads(line)
        limit = request.get("limit", limit)
        signal.alarm(limit)
        try:
            if answers is None:
                answers = _answers(make, request, versions)
                answer = next(answers)
            else:
                answer = answers.send(request)
        except Exception as error:  # whatever a side raises is its entry in the table
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        signal.alarm(0)
        answered.write(json.dumps(answer) + "\n")
        answered.flush()
