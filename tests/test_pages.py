"""The page of a comparison needs no other file, and what it says is what was found."""

import re
import shutil
import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison_example import example
from thoroughness import few

from lazyjax import Comparison, compare, load_tree, pages, plots, save_tree, verdicts
from lazyjax.comparison import compare_ensemble, join
from lazyjax.models import from_linen, shallow_mlp
from lazyjax.types import Dataset

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
X = np.linspace(-1, 1, 8)[:, None]
DATA = Dataset(X, jnp.sin(4 * X))


@pytest.fixture(scope="module")
def curve():
    return example()


@pytest.fixture(scope="module")
def classifier():
    x = jax.random.normal(jax.random.key(0), (12, 3))
    data = Dataset(x, jnp.argmax(x, 1))
    f, params = from_linen(nn.Dense(3, param_dtype=float), jax.random.key(1), x)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    return compare(f, params, data, optax.adam(0.05), steps=30, loss=loss, test=data)


@pytest.fixture(scope="module")
def seeds():
    keys = jax.random.split(jax.random.key(0), 2)
    f, params = jax.vmap(lambda key: from_linen(shallow_mlp(5), key, X))(keys)
    return compare_ensemble(f, params, DATA, optax.sgd(0.01), steps=30)


@pytest.mark.thorough
def test_the_page_has_verdict_figures_numbers_settings_and_the_lines(curve, tmp_path):
    path = curve.report(tmp_path / "new")
    assert path == tmp_path / "new" / "index.html"
    text = path.read_text()
    assert verdicts(curve)[0].sentence in text
    assert text.count("<img ") == len(curve.plot()) == 5
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    for name, value in curve.numbers().items():
        assert name in text
        assert f">{value:.4g}<" in text
    for name, value in curve.settings.items():
        assert name in text
        assert value in text
    assert "curve.report(tmp_path / &quot;new&quot;)" in text  # the line that made it


@pytest.fixture
def unpainted(monkeypatch):
    monkeypatch.setattr(pages, "_png", lambda figure: b"")


def test_lines_that_are_given_are_shown(curve, unpainted, tmp_path):
    own = curve.report(tmp_path / "own.html", code="a < b")
    assert own == tmp_path / "own.html"
    assert "a &lt; b" in own.read_text()


def test_members_have_a_column_each_and_their_labels(curve, unpainted, tmp_path):
    text = join([curve, curve]).report(tmp_path, ["one", "two"], code="").read_text()
    assert '<th class="number">one</th><th class="number">two</th>' in text
    assert "two: " in text
    assert "all 2" in text or "1 " in text
    assert "The lines" not in text


def test_many_members_have_a_range(curve, unpainted, tmp_path):
    text = join([curve] * 10).report(tmp_path, code="").read_text()
    assert '<th class="number">least</th>' in text


@pytest.mark.thorough
def test_figures_are_those_of_what_is_compared(curve, classifier, seeds):
    assert set(curve.plot()) == {"functions", "training", "layers", "kernels", "measures"}
    figures = classifier.plot()
    assert set(figures) == {"predictions", "training", "layers", "kernels", "measures"}
    accuracy = figures["predictions"].axes[2]
    assert accuracy.get_title() == "accuracy"
    (line, *_) = accuracy.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), classifier.network.train_accuracy[0])
    assert figures["kernels"].axes[0].get_xlabel() == "training points, by class"
    titles = [ax.get_title() for ax in curve.plot()["measures"].axes]
    assert "ReLU units that changed sides" in titles
    assert "sharpness" in titles
    assert len(seeds.plot()["predictions"].axes) == 2


@pytest.mark.thorough
def test_a_classifier_is_right_where_it_says_so(classifier):
    x, y = classifier.x, classifier.y
    outputs = classifier.network.train[0, -1]
    own = np.mean(outputs.argmax(-1) == y)
    assert classifier.network.train_accuracy[0, -1] == own
    assert classifier.network.test_accuracy[0, -1] == own
    assert np.all(classifier.disagreement_train == 0)  # it is linear
    assert x.shape == (12, 3)
    assert "softmax cross entropy" in classifier.no_closed_form


@pytest.mark.thorough
def test_notebooks_show_verdict_and_curves(curve):
    card = curve._repr_html_()
    assert verdicts(curve)[0].sentence in card
    assert card.count("<img ") == 1
    assert "in 300 steps" in curve.histories["network"]._repr_html_()


@pytest.mark.thorough
def test_notebooks_show_medians_of_an_ensemble(seeds):
    history = seeds.histories["network"]
    assert "2 members, medians: loss" in history._repr_html_()
    titles = [ax.get_title() for ax in history.plot().axes]
    assert titles == ["training loss", "movement of all weights", "movement of each layer"]


@few("name", ["curve", "classifier", "seeds"])
def test_it_comes_back_whole(name, request, tmp_path):
    compared = request.getfixturevalue(name)
    compared.save(tmp_path / "compared.npz")
    back = Comparison.load(tmp_path / "compared.npz")
    found, wanted = back.arrays(), compared.arrays()
    assert list(found) == list(wanted)
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array)
    assert back.numbers() == compared.numbers()
    assert back.settings == compared.settings
    assert verdicts(back) == verdicts(compared)
    for key, history in compared.histories.items():
        other = back.histories[key]
        np.testing.assert_array_equal(other.loss, history.loss)
        assert other.diverged_at == history.diverged_at
        jax.tree.map(np.testing.assert_array_equal, other.params, history.params)


@pytest.mark.thorough
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [420, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(classifier, tmp_path, width):
    """The browser itself says how wide the page is: in its title, by a line that is added."""
    page = classifier.report(tmp_path, code="x = 1\n" * 3)
    script = (
        "<script>addEventListener('load', () => { document.title = "
        "document.documentElement.scrollWidth + ' of ' + innerWidth; });</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", script))
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"),
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None
    assert int(found[1]) <= int(found[2])


def test_the_style_is_that_of_the_house():
    with plots.style():
        assert plots.MODELS["tangent"].line == "--"


def test_figures_need_one_label_a_member_and_one_target_a_test_point(curve):
    with pytest.raises(ValueError, match="`labels` must be one for each of the 1 members"):
        curve.plot(["a", "b"])
    with pytest.raises(ValueError, match="`labels` must be one for each of the 1 members"):
        curve.plot("a")
    with pytest.raises(ValueError, match="`target` must have one value for each of the 5 test"):
        curve.plot(target=np.ones(3))


def test_a_file_that_holds_no_comparison_is_refused(curve, tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` must be a saved file"):
        Comparison.load(tmp_path / "none.npz")
    params = {"a": X}
    save_tree(tmp_path / "params.npz", params)
    with pytest.raises(ValueError, match="`arrays` must hold structure"):
        Comparison.load(tmp_path / "params.npz")
    path = tmp_path / "compared.npz"
    curve.save(path)
    with pytest.raises(ValueError, match="must hold parameters|must hold"):
        load_tree(path, params)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="`path` must be a whole file"):
        Comparison.load(path)


@few("write", ["save", "report"])
def test_a_folder_that_cannot_be_written_is_an_error_that_leaves_nothing(write, curve, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):  # noqa: PT011 (the system's own words)
        getattr(curve, write)(tmp_path / "file" / "written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
