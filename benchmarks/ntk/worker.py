"""The worker's end of the line: a process that computes one kernel when it is asked to.

One JSON object a line. The first line is the task; then `{"do": ...}`:
    compile   -> {"seconds", "xla_mb"}     xla_mb: temporaries of the compiled code, where known
    call      -> {"seconds", "peak_mb"}    peak_mb: what the process grew by
    save      -> {}                        the kernel of the last call, to task["result"]
and whatever else a contender offers. The answer to a failure is {"error": ...}.
Needs numpy alone, so that it runs in the rivals' environment too.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

REFUSED_MB = 12_000  # an estimate above this is not tried


class OutOfMemory(Exception):
    """The contender would need more than `REFUSED_MB`."""


class Contender(NamedTuple):
    """What a worker serves."""

    compile: Callable[[], float | None]  # all before the first call; gives MB
    call: Callable[[], Any]  # finished when it returns
    save: Callable[[Any], np.ndarray]
    extra: dict[str, Callable[[], dict]] = {}  # noqa: RUF012  (never changed)


def refuse_above(megabytes: float | None) -> None:
    """Raise for an estimate that would not fit."""
    if megabytes is not None and megabytes > REFUSED_MB:
        raise OutOfMemory(f"needs {megabytes:.0f} MB")


def _status(name: str) -> float:
    """Give a field of this process's status in MB (Linux)."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    raise OSError(f"no {name}")


def _resident() -> float:
    try:
        return _status("VmRSS")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _peak() -> float:
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _forget_peak() -> None:
    """Let the peak start again from here: compilation often needs more than the call."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def growth(function: Callable[[], Any]) -> float:
    """Give the MB by which this process grows at most while a function runs."""
    _forget_peak()
    before = _resident()
    function()
    return max(_peak() - before, 0.0)


def _steps(contender: Contender, task: dict) -> dict[str, Callable[[], dict]]:
    last = {}

    def compile_() -> dict:
        _forget_peak()
        before = _resident()
        begin = time.perf_counter()
        megabytes = contender.compile()
        seconds = time.perf_counter() - begin
        refuse_above(megabytes)
        return {"seconds": seconds, "xla_mb": megabytes, "peak_mb": max(_peak() - before, 0.0)}

    def call() -> dict:
        last.clear()
        _forget_peak()
        before = _resident()
        begin = time.perf_counter()
        result = contender.call()
        seconds = time.perf_counter() - begin
        last["result"] = result
        return {"seconds": seconds, "peak_mb": max(_peak() - before, 0.0)}

    def save() -> dict:
        np.save(task["result"], contender.save(last["result"]))
        return {}

    return {"compile": compile_, "call": call, "save": save, **contender.extra}


def _end_with(parent: int) -> None:
    """End this process, whatever it computes, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def serve(make: Callable[[dict], Contender]) -> None:
    """Answer until the line closes.

    Parameters
    ----------
    make : task -> Contender
        Loads data and model; its imports belong to it, and are not timed.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    steps = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if steps is None:
                steps = _steps(make(request), request)
                answer({})
            else:
                answer(steps[request["do"]]())
        except (OutOfMemory, MemoryError) as error:
            answer({"error": "out of memory", "detail": str(error)})
        except KeyboardInterrupt:
            return
        except Exception as error:  # whatever a rival raises is its entry in the table
            text = str(error).strip().split("\n")[0][:300]
            memory = ("RESOURCE_EXHAUSTED", "not enough memory", "can't allocate memory")
            kind = "out of memory" if any(words in text for words in memory) else "fails"
            answer({"error": kind, "detail": f"{type(error).__name__}: {text}"})
