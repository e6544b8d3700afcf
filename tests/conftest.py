"""What every test rests on: float64, no silent broadcasting, no key used twice, no window."""

import gc
import itertools
import os
import tempfile

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest
from hypothesis import HealthCheck, Phase, settings

# compiles twice as fast; read when the first array is made, by processes that tests start too
FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # later versions have no such choice
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

matplotlib.use("Agg")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
gc.set_threshold(100_000)  # traces are many objects and few cycles

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/hypothesis")
settings.register_profile(
    "default",
    max_examples=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


OPTIMISED = {
    "test_budgets",
    "test_kernel_float32",
    "test_norms",
    "test_numbers",
    "test_store",
}
"""Modules of long runs, of what XLA says of a program, and of bits. All others have many small
programs that run once: to optimise them costs more than to run them."""


@pytest.fixture(autouse=True, scope="module")
def _compilation(request):
    little = request.module.__name__ not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", little)
    yield
    jax.clear_caches()


_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _room():
    yield
    if next(_numbers) % 100 == 0:
        jax.clear_caches()  # each program that is kept maps memory, and that has an end


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="with the tests that are marked thorough: every method on every model, and so on",
    )
    parser.addoption("--share", metavar="I/N", help="with the I-th of N shares of these only")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "thorough(long=False): runs with --thorough only; if long, in no share"
    )
    if hasattr(config, "cache"):  # compiled programs, for all workers and for the next run
        keep = {
            "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
            "jax_persistent_cache_min_compile_time_secs": -1,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for name, value in keep.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # for processes that tests start


def pytest_collection_modifyitems(config, items):
    every, share = config.getoption("thorough"), config.getoption("share")
    own, shares = map(int, share.split("/")) if share else (0, 1)
    turns = itertools.count()

    def runs(item):
        marker = item.get_closest_marker("thorough")
        if marker is None or every:
            return True
        return not marker.kwargs.get("long") and next(turns) % shares == own - 1

    chosen = [item for item in items if runs(item)]
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")
