"""Two processes: `python two_processes.py FOLDER CASE...`; what each case gave, and should, goes to a file for each.

What it should give is computed by one process, with the whole batch and layers that synchronise nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.tensor  # what DistributedDataParallel imports late
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robplug_advprop import convert, route

torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)], 0.1)  # imports the rest
CHILD = os.fork()  # here: to import torch takes longer than all that follows
RANK, FOLDER = (0 if CHILD else 1), Path(sys.argv[1])
Results = dict[str, tuple[Tensor, Tensor]]


def together(cuts: list[list[list[int]]], step: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Returns the own samples of each part, those of all processes, and the numbers of the latter.

    Args:
        cuts: for each step and process the sizes of the parts.
        step: which of them.
    """
    generator = torch.Generator().manual_seed(step)
    here, everyone = [], []
    for mine, other in zip(*cuts[step], strict=True):
        whole = torch.randn(mine + other, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 + step
        everyone.append(whole)
        here.append(whole[:mine] if RANK == 0 else whole[mine:])
    return here, everyone, [len(part) for part in everyone]


def own(everyone: Sequence[Tensor], here: Sequence[Tensor]) -> Tensor:
    """Returns of each part of all processes what belongs to this one."""
    pairs = zip(everyone, here, strict=True)
    return torch.cat([part[: len(mine)] if RANK == 0 else part[len(part) - len(mine) :] for part, mine in pairs])


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 4, 1), kind(4, momentum=None), nn.ReLU()]
    model = nn.Sequential(*layers, kind(4, affine=False), nn.Conv2d(4, 2, 2), kind(2, track_running_stats=False))
    return convert(model.double(), 2)


def loss_of(out: Tensor) -> Tensor:
    return (out.flatten(1).exp().sum(1).log() + out.flatten(1).square().sum(1)).sum()


def training() -> Results:
    """Several steps of DDP, with uneven parts; one of them is empty in one process, once one in both."""
    cuts = [
        [[3, 2, 2], [2, 4, 1]],
        [[1, 5, 2], [4, 1, 3]],
        [[4, 0, 2], [1, 3, 3]],
        [[0, 3, 4], [2, 2, 0]],
        [[2, 2, 1], [2, 2, 1]],
        [[0, 0, 0], [3, 4, 2]],
    ]
    ours, alone = network(nn.SyncBatchNorm), network(nn.BatchNorm2d)
    wrapped = DistributedDataParallel(ours)
    optimizers = [torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3) for model in (ours, alone)]
    found = {}
    for step in range(len(cuts)):
        here, everyone, sizes = together(cuts, step)
        total = sum(sizes)
        with route(ours, sizes=cuts[step][RANK]):
            mine = 2 * loss_of(wrapped(torch.cat(here))) / total  # DDP takes the mean over processes
        with route(alone, sizes=sizes):
            whole = loss_of(alone(torch.cat(everyone))) / total
        for optimizer, loss in zip(optimizers, (mine, whole), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses = mine.detach() / 2
        dist.all_reduce(losses)
        found[f"loss of step {step}"] = (losses, whole.detach())
    expected = alone.state_dict()
    return found | {name: (value, expected[name]) for name, value in ours.state_dict().items()}


def second_order() -> Results:
    """The gradient of a gradient's norm, with respect to samples, weight and bias."""
    ours, alone = (convert(kind(3).double()) for kind in (nn.SyncBatchNorm, nn.BatchNorm2d))
    here, everyone, sizes = together([[[3, 1], [2, 4]]], 0)

    def gradients(layer: nn.Module, x: Tensor, parts: list[int]) -> tuple[Tensor, ...]:
        with route(layer, sizes=parts):
            out = layer(x.requires_grad_())
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, layer.weight, layer.auxiliary[0].weight))

    mine = gradients(ours, torch.cat(here), [len(part) for part in here])
    by_x, *by_weights = gradients(alone, torch.cat(everyone), sizes)
    for gradient in mine[1:]:
        dist.all_reduce(gradient)
    pairs = zip(("x", "weight", "auxiliary weight"), mine, (own(by_x.split(sizes), here), *by_weights), strict=True)
    return {name: (one, other) for name, one, other in pairs}


def whole_batches() -> Results:
    """Routes of one number, and different routes in the two processes."""
    found = {}
    for k, options in enumerate(({}, {"which": 2}, {"which": RANK}, {"sizes": [[4], [2, 3]][RANK]})):
        ours, alone = (convert(kind(3).double(), 2) for kind in (nn.SyncBatchNorm, nn.BatchNorm2d))
        cuts = [[[4, 0, 0], [5, 0, 0]], [[0, 0, 4], [0, 0, 5]], [[4, 0, 0], [0, 5, 0]], [[4, 0, 0], [2, 3, 0]]]
        here, everyone, sizes = together(cuts, k)
        with route(ours, **(options or {"which": "main"})):
            out = ours(torch.cat(here))
        kept = [size for size in sizes if size]
        statistics = [part for part, size in zip((alone, *alone.auxiliary), sizes, strict=True) if size]
        for plain, part in zip(statistics, torch.cat(everyone).split(kept), strict=True):
            F.batch_norm(part, plain.running_mean, plain.running_var, training=True)
            plain.num_batches_tracked += 1
        expected = [F.batch_norm(part, None, None, training=True) if len(part) else part for part in everyone]
        found[f"{options} out"] = (out, own(expected, here))
        state = alone.state_dict()
        found |= {f"{options} {name}": (value, state[name]) for name, value in ours.state_dict().items()}
    return found


def far_from_zero() -> Results:
    """Single precision, where the mean of the squares would drown the variance."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(10, 2, 8, 8, generator=generator, dtype=torch.float64) + 1e4).float()
    layer = convert(nn.SyncBatchNorm(2, momentum=1.0))
    with route(layer, sizes=[3, 1] if RANK == 0 else [2, 4]):
        layer(torch.cat([x[:3], x[5:6]]) if RANK == 0 else torch.cat([x[3:5], x[6:]]))
    truth = zip(("main", "auxiliary"), (layer, layer.auxiliary[0]), x.double().split(5), strict=True)
    return {name: (part.running_var.double(), exact.var((0, 2, 3))) for name, part, exact in truth}


def half_precision() -> Results:
    """Dtype and strides of a batch stay; it is computed in single precision."""
    ours, alone = (convert(kind(3)) for kind in (nn.SyncBatchNorm, nn.BatchNorm2d))
    here, everyone, sizes = together([[[3, 1], [2, 4]]], 0)
    x = torch.cat(here).bfloat16().to(memory_format=torch.channels_last)
    with route(ours, sizes=[len(part) for part in here]), torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    assert (out.dtype, out.stride()) == (x.dtype, x.stride())
    with route(alone, sizes=sizes):
        expected = alone(torch.cat(everyone).bfloat16().float())
    return {"out": (out.float(), own(expected.split(sizes), here)), "var": (ours.running_var, alone.running_var)}


def eval_mode() -> Results:
    """Nothing is shared: one process alone makes a pass, with an empty part."""
    layer, x = convert(nn.SyncBatchNorm(3).double()).eval(), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    if RANK:
        with route(layer, sizes=[0, 2]):
            return {"out": (layer(x), x / (1 + 1e-5) ** 0.5)}
    return {}


def compiled() -> Results:
    """Without a graph break: the collectives are part of the graph, forward and backward."""
    eager, graph = (convert(nn.SyncBatchNorm(3).double()) for _ in range(2))
    here, *_ = together([[[3, 1], [2, 4]]], 0)
    for layer in (eager, torch.compile(graph, backend="aot_eager", fullgraph=True)):
        with route(layer, sizes=[len(part) for part in here]):
            layer(torch.cat(here)).pow(3).sum().backward()
    found = {name: (part.grad, eager.get_parameter(name).grad) for name, part in graph.named_parameters()}
    return found | {name: (part, eager.get_buffer(name)) for name, part in graph.named_buffers()}


def errors() -> dict[str, str]:
    """One value a channel in all, a group that is empty everywhere, and a negative size."""
    found, layer = {}, convert(nn.SyncBatchNorm(3))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for name, sizes in (("one value", [2, 1 - RANK]), ("no value", [2, 0]), ("negative", [3, -1])):
        try:
            with route(layer, sizes=sizes):
                layer(torch.rand(sum(sizes), 3))
        except ValueError as error:
            found[name] = str(error)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    return found


def main() -> None:
    """Runs cases among two processes that wait at most 20 seconds for each other."""
    where = f"file://{FOLDER / 'meeting'}"
    dist.init_process_group("gloo", init_method=where, rank=RANK, world_size=2, timeout=timedelta(seconds=20))
    torch.save({name: globals()[name]() for name in sys.argv[2:]}, FOLDER / f"{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    if CHILD:
        sys.exit(os.waitpid(CHILD, 0)[1] != 0)
