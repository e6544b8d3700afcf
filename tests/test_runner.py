import dataclasses
import inspect
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

from experiments import __main__ as command
from experiments import results as disk
from experiments import runner
from experiments.report import write_report
from experiments.settings import Descent, Settings
from lazyjax import checks
from lazyjax.data import make_dataset

TABLE = runner.discover()


# --- an experiment in small


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    float64: bool = True
    size: int = 5
    pause: float = 0.0
    rates: tuple[float, ...] = (0.1, 0.2)

    def __post_init__(self):
        checks.whole("size", self.size, least=1)


def small(name="small"):
    def run(config):
        module.runs += 1
        numbers = []
        for i in range(config.size):
            time.sleep(config.pause)
            numbers.append(np.random.default_rng([config.seed, i]).normal())
        summary = {"mean": float(np.mean(numbers)), "bad": {"value": np.nan}}
        return disk.Results(config, {"numbers": np.array(numbers)}, summary)

    def plot(results):
        module.draws += 1
        figure, ax = plt.subplots(figsize=(2, 2))
        ax.plot(results.arrays["numbers"])
        return {"numbers": figure}

    module = SimpleNamespace(
        __name__=f"experiments.{name}",
        __doc__="Is it <small>?\n\nLook at the numbers.",
        SECTIONS="1",
        QUICK={"size": 2},
        Config=Config,
        run=run,
        plot=plot,
        conclude=lambda results: [f"The mean is {results.summary['mean']:.3f}."],
        runs=0,
        draws=0,
    )
    return module


@pytest.fixture
def go(tmp_path):
    table = {"first": small("first"), "second": small("second")}

    def run(out=tmp_path / "results", *, force=False, **fields):
        go_text = io.StringIO()
        configs = {
            name: runner.make_config(e, quick=False, seed=None, **fields)
            for name, e in table.items()
        }
        failed = runner.run_all(
            table, configs, out, force=force, console=Console(file=go_text, width=120)
        )
        return SimpleNamespace(failed=failed, text=go_text.getvalue(), out=out)

    run.table = table
    yield run
    jax.config.update("jax_enable_x64", True)


def files(folder, *names):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (not names or path.name in names)
    }


def test_a_run_leaves_config_arrays_summary_figures_and_a_report(go):
    result = go()
    folder = result.out / "first"
    assert set(files(folder)) == {
        "arrays.npz", "config.json", "done.json", "numbers.png", "summary.json", "timings.json",
    }  # fmt: skip # to be read as a table
    assert json.loads((folder / "config.json").read_text())["size"] == 5
    assert json.loads((folder / "summary.json").read_text())["bad"]["value"] == "nan"
    assert result.failed == []
    assert "The mean is" in result.text
    page = (result.out / "index.html").read_text()
    assert "Is it &lt;small&gt;?" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for needed in ("The mean is", "rates", "run, seconds"):
        assert needed in page


def test_results_come_back_as_they_were(go):
    go()
    results = disk.load(go().out / "first", Config)
    assert results.config == Config()
    assert results.arrays["numbers"].shape == (5,)
    assert np.isnan(results.summary["bad"]["value"])


def test_finished_experiments_are_skipped_unless_forced_or_changed(go):
    go()
    assert "first is finished already" in go().text
    assert go.table["first"].runs == 1
    go(force=True)
    assert go.table["first"].runs == 2
    go(size=6)
    assert go.table["first"].runs == 3
    go(size=6)
    assert go.table["first"].runs == 3


@pytest.mark.parametrize("name", ["arrays.npz", "summary.json", "config.json", "done.json"])
@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_what_is_torn_or_gone_is_run_again(name, damage, go):
    out = go().out
    whole = files(out, "arrays.npz", "summary.json", "config.json")
    path = out / "first" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    go()
    assert go.table["first"].runs == 2
    assert go.table["second"].runs == 1
    assert files(out, "arrays.npz", "summary.json", "config.json") == whole


def test_results_of_another_format_are_run_again(go):
    path = go().out / "first" / "done.json"
    marker = json.loads(path.read_text())
    assert marker["format"] == disk.FORMAT
    for other in ({"format": disk.FORMAT - 1}, {}):  # the first format had no number
        path.write_text(json.dumps({k: v for k, v in marker.items() if k != "format"} | other))
        assert not disk.is_whole(path.parent)
    go()
    assert go.table["first"].runs == 2
    assert go.table["second"].runs == 1
    assert disk.is_whole(path.parent)


def test_figures_that_are_gone_are_drawn_without_computing(go):
    out = go().out
    (out / "first" / "numbers.png").unlink()
    go()
    assert (out / "first" / "numbers.png").is_file()
    assert go.table["first"].runs == 1
    runner.redraw(go.table["first"], out / "first")
    assert go.table["first"].runs == 1
    assert go.table["first"].draws == 3


def test_an_experiment_that_fails_is_told_and_the_others_run(go):
    def fail(config):
        raise RuntimeError("out of luck")

    go.table["first"].run = fail
    result = go()
    assert result.failed == ["first"]
    assert "out of luck" in result.text
    assert disk.is_whole(result.out / "second")
    assert not disk.is_whole(result.out / "first")


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(go, tmp_path):
    def interrupt(config):
        raise KeyboardInterrupt

    go.table["second"].run = interrupt
    with pytest.raises(runner.Interrupted, match="Interrupted in second.*same command goes on"):
        go()
    out = tmp_path / "results"
    assert disk.is_whole(out / "first")
    assert not disk.is_whole(out / "second")
    assert "Not run yet: second" in (out / "index.html").read_text()


SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from rich.console import Console
from experiments import runner
from test_runner import small
table = {name: small(name) for name in ("a", "b", "c")}
configs = {name: runner.make_config(e, quick=False, seed=0, pause=0.05) for name, e in table.items()}
runner.run_all(table, configs, Path(sys.argv[1]), force=False, console=Console())
print("runs", *[e.runs for e in table.values()])
"""


def start(out):
    here = Path(__file__).parent
    command_line = [sys.executable, "-c", SCRIPT, str(out), str(here.parent), str(here)]
    return subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True)


@pytest.mark.thorough
def test_a_run_that_is_killed_ends_as_an_undisturbed_one(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    start(undisturbed).communicate()
    finished = []
    for when in ("a/arrays.npz", "b/done.json"):
        process = start(killed)
        while not (killed / when).is_file():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        (killed / "a" / ".arrays.npz.1.tmp").write_bytes(b"half")  # as a kill within a write leaves
        finished.append([name for name in "abc" if disk.is_whole(killed / name)])
    runs = start(killed).communicate()[0].split("runs")[-1].split()
    assert "b" in finished[-1]
    assert [n == "0" for n in runs] == [name in finished[-1] for name in "abc"]
    counted = ("arrays.npz", "summary.json", "config.json")
    assert files(killed, *counted) == files(undisturbed, *counted)
    assert len(files(killed, *counted)) == 9


# --- the experiments that there are


@pytest.mark.parametrize("name", TABLE)
def test_every_experiment_keeps_the_protocol(name):
    experiment = TABLE[name]
    assert runner.question(experiment).endswith("?")
    source = (
        "Source: practical, section" if experiment.SECTIONS else "Source: an experiment of ours"
    )
    assert source in experiment.__doc__
    config = experiment.Config()
    fields = {field.name for field in dataclasses.fields(config)}
    assert {"seed", "float64"} <= fields
    assert set(experiment.QUICK) <= fields
    assert runner.make_config(experiment, quick=True, seed=3).seed == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert issubclass(experiment.Config, Settings)
    body = "".join(inspect.getsource(own) for own in experiment.Config.__mro__[:-1])
    for field in fields:
        assert re.search(rf'^    {field}: .+\n    """', body, flags=re.MULTILINE), field


def test_the_experiments_come_in_the_order_of_the_practical():
    """Those that are not in it come last."""
    sections = [int((*re.findall(r"\d+", e.SECTIONS), "99")[0]) for e in TABLE.values()]
    assert sections == sorted(sections)


def test_an_experiment_without_its_package_is_left_out_and_fails_only_if_it_was_asked_for(go):
    def lacking(config):
        raise disk.Missing('it needs a package. Run python -m pip install -e ".[data]".')

    go.table["second"].run = lacking
    result = go()
    assert result.failed == []
    assert "second is left out: it needs a package." in result.text
    del go.table["first"]
    assert go().failed == ["second"]


def test_the_points_of_a_fit_come_in_the_order_of_x():
    config = Descent(n=9, target="complex")
    x, y = config.dataset(jax.random.key(3), noise=0.1)
    drawn = make_dataset(jax.random.key(3), n=9, noise=0.1, target="complex")
    assert x.shape == y.shape == (9, 1)
    assert np.all(np.diff(x[:, 0]) > 0)
    order = np.argsort(drawn.x[:, 0])
    np.testing.assert_array_equal(x, drawn.x[order])
    np.testing.assert_array_equal(y, drawn.y[order])
    grid = config.grid(5)
    np.testing.assert_array_equal(grid.x[:, 0], [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(grid.y, np.sin(10 * grid.x) * np.cos(2 * grid.x + 1))


def test_ranges_are_of_the_numbers_that_all_members_have():
    members = [{"a": 1.0, "b": 2.0}, {"a": 5.0}, {"a": 2.0, "b": 0.0}]
    assert disk.spread(members) == {"a": {"median": 2.0, "least": 1.0, "most": 5.0}}
    assert [disk.percent(s) for s in (1.983, 0.996, 0.0337, 0.0)] == [
        "200 %", "100 %", "3.4 %", "0 %",
    ]  # fmt: skip # to be read as a table


# --- the command line


def test_every_field_of_a_config_is_a_flag():
    options, rest = command._split(
        ["run", "width_sweep", "--widths", "5", "50", "--quick", "--steps", "70", "--seed", "4"]
    )
    config = command._configs(options, rest, TABLE)["width_sweep"]
    assert config.widths == (5, 50)
    assert config.steps == 70
    assert config.seed == 4
    assert options.out == Path("results")


def test_help_of_one_experiment_shows_its_flags(capsys):
    assert command.main(["run", "width_sweep", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--learning-rate" in shown
    assert "Hidden units of each network" in shown


BAD = {
    "a misspelt name": (["run", "width_swep"], "got 'width_swep'. Did you mean width_sweep"),
    "a misspelt command": (["rnu", "all"], "got 'rnu'. Did you mean run"),
    "no name": (["run"], "`name` must be given"),
    "a flag for two": (["run", "all", "--steps", "3"], "`--steps` must come with one experiment"),
    "a flag for plot": (["plot", "width_sweep", "--steps", "3"], "`--steps` must come with run"),
    "no results": (["plot", "width_sweep", "--out", "{tmp}"], "got none in .*run width_sweep"),
    "no steps": (["run", "width_sweep", "--steps", "0"], "`steps` must be at least 1, got 0"),
    "no rate": (["run", "width_sweep", "--learning-rate", "0"], "`learning_rate` must be positive"),
    "no width": (["run", "width_sweep", "--widths", "0"], "`widths` must be at least 1"),
    "a target": (
        ["run", "deep_fit", "--target", "mid"],
        "must be one of simple.*Did you mean middle",
    ),
    "no points": (["run", "deep_fit", "--n", "-1"], "`n` must be at least 1, got -1"),
    "a file for a folder": (
        ["run", "width_sweep", "--out", "{tmp}/file/results"],
        "`out` must be a folder that can be written",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_commands_say_what_is_wrong_and_do_nothing(name, tmp_path, capsys):
    arguments, message = BAD[name]
    (tmp_path / "file").write_text("")
    assert command.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    told = capsys.readouterr()
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", told.err + told.out).split())
    assert re.search(message, text)
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_list_tells_questions_and_the_bare_command_helps(capsys):
    assert command.main(["list", "--out", "nowhere"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in TABLE)
    assert command.main([]) == 2
    assert "run NAME" in capsys.readouterr().out


def test_the_report_of_nothing_says_what_is_missing(tmp_path):
    page = write_report(TABLE, tmp_path).read_text()
    assert "Not run yet: " in page
    assert page.startswith("<!doctype html>")
