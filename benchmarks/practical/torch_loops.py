"""The practical's own loops, written straight in PyTorch: what a reader of it runs.

`train` is the practical's function: an optimiser step, the loss and a copy of the last parameter
every step. Imports, figures and the building of models are left out of the times.
"""

# pyright: reportMissingImports=false

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

WARM_UP = 200
LONGEST = 5000  # steps of a loop that are timed; longer ones are scaled


def middle(x: torch.Tensor) -> torch.Tensor:
    return torch.abs(x + 0.5) - 2 * torch.clamp(x - 0.5, min=0) - 0.4


class Data:
    """n points in [-1, 1]; a batch size of n or more gives all of them."""

    def __init__(self, n: int, noise: float = 0.0):
        self.inputs = 2 * torch.rand(n, 1) - 1
        self.labels = middle(self.inputs) + noise * torch.randn(n, 1)

    def next_batch(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        if batch_size >= len(self.inputs):
            return self.inputs, self.labels
        which = torch.randperm(len(self.inputs))[:batch_size]
        return self.inputs[which], self.labels[which]


class Network(nn.Module):
    """What the practical's models have in common: the history of the last parameter."""

    def __init__(self):
        super().__init__()
        self.weight_history = []

    def save_weights(self):
        with torch.no_grad():
            self.weight_history.append(np.copy(list(self.parameters())[-1].numpy()))


class Shallow(Network):
    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.output = nn.Linear(1, width), nn.Linear(width, 1)

    def forward(self, x):
        return self.output(torch.relu(self.hidden(x)))


class Deep(Network):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.output = nn.Linear(width, 1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.output(x)


class Scaled(Network):
    """alpha (f(w, x) - f(w0, x)), with a frozen copy of the base model."""

    def __init__(self, width: int, alpha: float):
        super().__init__()
        self.alpha, self.model, base = alpha, Deep(width), Deep(width)
        base.load_state_dict(self.model.state_dict())
        self.base = [base]

    def forward(self, x):
        with torch.no_grad():
            base = self.base[0](x).detach()
        return self.alpha * (self.model(x) - base)


class Sinusoidal(Network):
    def __init__(self, dimension: int, frequency: float = 2 * np.pi):
        super().__init__()
        self.dimension, self.frequency = dimension, frequency
        self.output = nn.Linear(dimension, 1)

    def forward(self, x):
        r = self.frequency * torch.arange(self.dimension // 2) * x
        return self.output(torch.concatenate([torch.sin(r), torch.cos(r)], dim=1))


def train(net, data, *, steps, batch_size, lr, save_weights_every=1):
    """The practical's function."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    criterion = nn.MSELoss()
    losses = []
    for i in range(steps):
        inputs, labels = data.next_batch(batch_size)
        optimizer.zero_grad()
        loss = criterion(net(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().numpy())
        if save_weights_every > 0 and i % save_weights_every == 0:
            net.save_weights()
    return losses


def surface(x, y):
    return torch.sin(x + 4) * (torch.cos(3 * y - 5) + 0.3) + 0.5 * torch.cos(
        2 * (x + 2) * (y - 4) ** 2
    )


class Point(nn.Module):
    def __init__(self, w0):
        super().__init__()
        self.param = nn.Parameter(w0)

    def forward(self):
        e0, e1 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        return surface(e0 @ self.param, e1 @ self.param)


def descend(steps: int) -> None:
    """One start of section 28: the small and the big step size, side by side."""
    w0 = 3 * (torch.rand(2) - 0.5)
    small, big = Point(w0.clone()), Point(w0.clone())
    runs = [
        (m, torch.optim.SGD(m.parameters(), lr=lr), []) for m, lr in ((small, 1e-4), (big, 2e-3))
    ]
    for _ in range(steps):
        for model, optimizer, weights in runs:
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
            with torch.no_grad():
                weights.append(np.copy(model.param))


def timed(
    loop: Callable[[int], object], steps: int, repeats: int, longest: int
) -> tuple[float, bool]:
    """Give the seconds of `repeats` loops of `steps`, and whether they are scaled.

    A loop of more than `longest` steps in all is timed on that many, after a warm-up.
    """
    loop(WARM_UP)
    total = steps * repeats
    measured = min(total, longest)
    begin = time.perf_counter()
    for _ in range(max(1, measured // steps)):
        loop(min(steps, measured))
    ran = max(1, measured // steps) * min(steps, measured)
    return (time.perf_counter() - begin) * total / ran, ran < total


def measure(
    threads: int, names: Iterable[str], longest: int = LONGEST
) -> dict[str, tuple[float, bool]]:
    """Time the loops of some sections that train, with so many threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data, ten, noisy = Data(15), Data(10), Data(50, 0.05)

    def fit(make, dataset, batch_size, lr, every=1):
        return lambda steps: train(
            make(), dataset, steps=steps, batch_size=batch_size, lr=lr, save_weights_every=every
        )

    parts = {
        "deep_fit": [(fit(lambda: Deep(10), data, 15, 0.1), 10_000, 1)],
        "sinusoidal_features": [
            (fit(lambda: Sinusoidal(8), data, 15, 0.01), 10_000, 1),
            (fit(lambda: Sinusoidal(200), data, 15, 0.01), 100, 1),
            (fit(lambda: Sinusoidal(100), data, 15, 0.01), 10_000, 10),
        ],
        "random_inits": [(fit(lambda: Shallow(10), data, 30, 1e-3), 5000, 10)],
        "width_sweep": [
            (fit(lambda w=w: Shallow(w), data, 15, 2e-3), 50_000, 1) for w in (5, 10, 100, 1000)
        ],
        "bad_init": [(fit(lambda: Shallow(100), data, 30, 1e-3), 1002, 10)],
        "alpha_scaling": [
            (fit(lambda a=a: Scaled(8, a), ten, 10, 0.01 / a**2), 10_000, 1) for a in (1, 100, 1000)
        ],
        "bias_complexity": [
            (fit(lambda: Sinusoidal(30, 0.2 * np.pi), noisy, 50, 0.01, -1), 2000, 1),
            *(
                (fit(lambda d=d: Sinusoidal(d, 0.2 * np.pi), noisy, 100, 0.1, -1), 1000, 10)
                for d in range(2, 200, 28)
            ),
        ],
        "flow_vs_descent": [(descend, 10_000, 100)],
    }
    weights = {"bias_complexity": [1.0] + [99 / 8] * 8}  # 8 of the 99 dimensions stand for all
    results = {}
    for name in names:
        seconds = [timed(loop, steps, repeats, longest) for loop, steps, repeats in parts[name]]
        factors = weights.get(name, [1.0] * len(seconds))
        total = sum(s * w for (s, _), w in zip(seconds, factors, strict=True))
        results[name] = (total, any(scaled for _, scaled in seconds) or name in weights)
    return results
