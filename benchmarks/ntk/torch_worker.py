"""PyTorch: the two methods of its own tutorial on neural tangent kernels, and nngeometry.

The tutorial has no way to say x2 = x1; contraction keeps one Jacobian then, products run as they
are. nngeometry has nothing but x2 = x1.
"""

# pyright: reportMissingImports=false

import math

import torch
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from benchmarks.ntk.cases import read
from benchmarks.ntk.worker import Contender, refuse_above, serve


def mlp(params: dict) -> torch.nn.Module:
    layers = []
    for i in range(sum(name.endswith("/w") for name in params)):
        w, b = params[f"{i}/w"], params[f"{i}/b"]
        layers += [_with(torch.nn.Linear(*w.shape), w.T, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def cnn(params: dict) -> torch.nn.Module:
    layers = []
    for i in range(3):
        w, b = params[f"{i}/w"], params[f"{i}/b"]
        inputs, outputs = w.shape[2:]
        convolution = torch.nn.Conv2d(inputs, outputs, 3, padding=1)
        layers += [_with(convolution, w.transpose(3, 2, 0, 1), b), torch.nn.ReLU()]
    w, b = params["head/w"], params["head/b"]
    pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, *pool, _with(torch.nn.Linear(*w.shape), w.T, b))


def _with(layer, weight, bias):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


MODELS = {"a": mlp, "b": mlp, "c": cnn}


def _inputs(x):
    x = torch.tensor(x)
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def _single(net):
    return lambda params, x: functional_call(net, params, (x[None],))[0]


def contraction(net, params, x1, x2, reduce):
    def jacobian(x):
        leaves = vmap(jacrev(_single(net)), (None, 0))(params, x)
        return [leaf.flatten(2) for leaf in leaves.values()]

    j1 = jacobian(x1)
    j2 = j1 if x2 is None else jacobian(x2)
    equation = "Naf,Mbf->NMab" if reduce == "none" else "Naf,Maf->NM"
    total = sum(torch.einsum(equation, a, b) for a, b in zip(j1, j2, strict=True))
    return total if reduce == "none" else total / j1[0].shape[1]


def products(net, params, x1, x2, reduce):
    f = _single(net)

    def of_pair(one, two):
        y, pull_back = vjp(lambda p: f(p, one), params)[:2]

        def column(direction):
            return jvp(lambda p: f(p, two), (params,), pull_back(direction))[1]

        return vmap(column)(torch.eye(y.numel()).reshape(y.numel(), *y.shape))

    full = vmap(vmap(of_pair, (None, 0)), (0, None))(x1, x1 if x2 is None else x2)
    return full if reduce == "none" else torch.einsum("NMKK->NM", full) / full.shape[-1]


def nngeometry(net, params, x1, x2, reduce):
    from nngeometry.gram import GramMatrix

    batch = torch.utils.data.TensorDataset(x1)
    gram = GramMatrix(net, torch.utils.data.DataLoader(batch, batch_size=len(x1)))
    return gram.to_torch().permute(1, 3, 0, 2)  # from (K, N, K, N)


METHODS = {"contraction": contraction, "products": products, "nngeometry": nngeometry}


def make(task: dict) -> Contender:
    data = read(task["data"])
    net, x1 = MODELS[task["case"]](data.params), _inputs(data.x1)
    x2 = None if task["symmetric"] else _inputs(data.x2)
    params = {name: w.detach() for name, w in net.named_parameters()}
    sides = 1 if x2 is None else 2

    def compile_() -> None:  # nothing to compile; an estimate of what does not fit
        jacobian = len(x1) * net(x1[:1]).shape[1] * sum(math.prod(w.shape) for w in params.values())
        if task["method"] == "contraction":
            refuse_above(sides * 4 * jacobian / 2**20)

    def call():
        return METHODS[task["method"]](net, params, x1, x2, task["reduce"])

    return Contender(compile_, call, lambda kernel: kernel.detach().numpy())


if __name__ == "__main__":
    serve(make)
