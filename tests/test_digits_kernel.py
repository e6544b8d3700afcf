import numpy as np
import pytest

from experiments.digits_kernel import Config, conclude, plot, run

SMALL = {
    "examples": 90, "channels": (3, 4), "widths": (24,), "steps": 150, "eigenvalues": 12,
    "probes": 2, "rank": 70, "pictured": 3,
}  # fmt: skip # to be read as a table


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of noisy bars, 6 x 6: the place of a bar is its label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    x = 0.1 * rng.standard_normal((90, 6, 6))
    x[np.arange(90), :, 2 * labels] += 1
    path = tmp_path_factory.mktemp("images") / "bars.npz"
    np.savez(path, x=x, y=labels)
    return path


@pytest.fixture(scope="module")
def results(images):
    """Of the MLP; the quick run of all experiments has the CNN too."""
    return run(Config(data=str(images), networks=("MLP",), **SMALL))


@pytest.mark.thorough
def test_everybody_reads_what_is_easy(results):
    for facts in results.summary.values():
        assert len(facts["test accuracy"]) == 4
        assert min(facts["test accuracy"].values()) > 0.9


@pytest.mark.thorough
def test_the_spectra_are_those_of_the_kernels(results):
    for name, facts in results.summary.items():
        for stage in ("initial", "final"):
            values = results.arrays[f"{name}_{stage}_eigenvalues"]
            assert values.shape == (12,)
            assert np.all(np.diff(values) <= 0)
            assert 0 < facts[f"share of the trace in ten eigenvalues, {stage}"] < 1
            weights = results.arrays[f"{name}_{stage}_weights"]
            assert weights.shape == results.arrays[f"{name}_{stage}_nodes"].shape == (2, 64)
            np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
            kernel = results.arrays[f"{name}_{stage}_kernel"]
            assert kernel.shape == (9, 9)
            np.testing.assert_array_equal(kernel, kernel.T)


@pytest.mark.thorough
def test_training_aligns_the_kernel_with_the_labels(results):
    for facts in results.summary.values():
        before, after = (facts[f"alignment with the labels, {s}"] for s in ("initial", "final"))
        assert after > before


@pytest.mark.thorough
def test_figures_and_conclusions_tell_the_network(results):
    figures = plot(results)
    assert set(figures) == {"accuracies", "training", "kernels", "spectra"}
    told = " ".join(conclude(results))
    assert "MLP, test accuracy: network" in told
    assert "MLP: the weights moved by" in told


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"networks": ("RNN",)}, ValueError, "`networks` must be one of CNN, MLP"),
        ({"channels": ()}, ValueError, "number of `channels.* must be at least 1"),
        ({"widths": (0,)}, ValueError, "`widths` must be at least 1"),
        ({"examples": 5}, ValueError, "`examples` must be at least 20"),
        ({"test": 1.0}, ValueError, "`test` must be between 0 and 1"),
        ({"ridge": 0.0}, ValueError, "`ridge` must be positive"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate` must be positive"),
        ({"probes": 1}, ValueError, "`probes` must be at least 2"),
        ({"steps": 2.5}, TypeError, "`steps` must be a whole number"),
    ],
)
def test_bad_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        Config(**change)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((30, 4, 4))}, "`data` must hold the arrays x and y, got"),
        ({"x": np.zeros((30, 16)), "y": np.zeros(30, int)}, "`data` must hold images x"),
        ({"x": np.zeros((30, 4, 4)), "y": np.zeros(30)}, "`data` must hold images x"),
    ],
)
def test_images_that_do_not_fit_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        run(Config(data=str(tmp_path / "bad.npz")))


def test_the_digits_are_there():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from experiments.digits_kernel import images_of

    x, labels = images_of(Config())
    assert x.shape == (1797, 8, 8, 1)
    assert set(labels) == set(range(10))
    assert x.max() == 1
