"""Small trainings on several ranks beside one process: DDP, FSDP2, gradient accumulation."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from oracles import randn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_kernels as ck

SIZES = (5, 2, 4, 3)  # rows of each rank


class Encoder(nn.Module):
    """Features, and the loss with learned scale and bias, so that DDP sees all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(6, 5).double(), nn.Linear(7, 5).double()
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=i))
        self.scale = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([-2.0], dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor, **options) -> Tensor:
        x, y = self.images(images), self.texts(texts)
        sigmoid = ck.siglip_loss(x, y, self.scale.exp(), self.bias, **options)
        return sigmoid + ck.clip_loss(x, y, self.scale.exp(), **options)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    rows = sum(SIZES[: dist.get_world_size()])
    return randn(rows, 6, seed=seed), randn(rows, 7, seed=seed + 1)


def mine(*tensors: Tensor) -> list[Tensor]:
    rank = dist.get_rank()
    start = sum(SIZES[:rank])
    return [t[start : start + SIZES[rank]] for t in tensors]


def errors(model: nn.Module, expected: nn.Module) -> dict[str, float]:
    def whole(t: Tensor) -> Tensor:
        return t.full_tensor() if hasattr(t, "full_tensor") else t

    pairs = zip(model.named_parameters(), expected.parameters(), strict=True)
    return {name: (whole(a.grad) - b.grad).abs().max().item() for (name, a), b in pairs}


def ddp() -> dict[str, float]:
    one = Encoder()
    model = DistributedDataParallel(copy.deepcopy(one))
    one(*batch(10)).backward()
    model(*mine(*batch(10)), group=dist.group.WORLD).backward()
    return errors(model, one)


def accumulated() -> dict[str, float]:
    one = Encoder()
    model = DistributedDataParallel(copy.deepcopy(one))
    for seed in (10, 20):
        one(*batch(seed)).div(2).backward()
    with model.no_sync():
        model(*mine(*batch(10)), group=dist.group.WORLD, exchange="ring").div(2).backward()
    model(*mine(*batch(20)), group=dist.group.WORLD, exchange="ring").div(2).backward()
    return errors(model, one)


def fsdp() -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    one, model = Encoder(), Encoder()
    for layer in (model.images, model.texts):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    one(*batch(10)).backward()
    model(*mine(*batch(10)), group=mesh).backward()
    return errors(model, one)


def cached(chunk: int = 2) -> dict[str, float]:
    """Gradient caching: features first, the loss on leaves, then the encoder chunk by chunk."""
    one = Encoder()
    model = copy.deepcopy(one)
    one(*batch(10)).backward()
    images, texts = mine(*batch(10))
    with torch.no_grad():
        leaves = [model.images(images), model.texts(texts)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, y, scale = *leaves, model.scale.exp()
    loss = ck.siglip_loss(x, y, scale, model.bias, group=dist.group.WORLD)
    (loss + ck.clip_loss(x, y, scale, group=dist.group.WORLD)).backward()
    for encoder, inputs, leaf in ((model.images, images, x), (model.texts, texts, y)):
        for part, grad in zip(inputs.split(chunk), leaf.grad.split(chunk), strict=True):
            encoder(part).backward(grad)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    return errors(model, one)


def everything() -> dict[str, dict[str, float]]:
    return {f.__name__: f() for f in (ddp, accumulated, fsdp, cached)}
