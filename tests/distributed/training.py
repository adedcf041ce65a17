"""Small trainings on several ranks beside one process: DDP, FSDP2, gradient accumulation."""

from __future__ import annotations

import copy
import io
import pickle

import torch
import torch.distributed as dist
from comparisons import FIRST, Setup
from oracles import randn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import contrastive_kernels as ck
from contrastive_kernels.losses.cases import call

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


class Features(Encoder):
    """What the loss takes, so that DDP and FSDP see all parameters."""

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        scale, bias = self.scale.exp().squeeze(), self.bias.squeeze()
        return self.images(images), self.texts(texts), scale, bias


def of_features(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, **options) -> Tensor:
    return ck.siglip_loss(x, y, scale, bias, **options) + ck.clip_loss(x, y, scale, **options)


def cached() -> dict[str, float]:
    one = Encoder()
    model = DistributedDataParallel(Features())
    one(*batch(10)).backward()
    ck.cached_step(model, mine(*batch(10)), of_features, chunk=2, group="world")
    return errors(model, one)


def cached_and_accumulated() -> dict[str, float]:
    """Two batches; then the first alone again, which a broken reduction would not survive."""
    one = Encoder()
    model = DistributedDataParallel(Features())

    def half(*features: Tensor, **options) -> Tensor:
        return of_features(*features, **options) / 2

    for seed in (10, 20, 10):
        one(*batch(seed)).div(2).backward()
    with model.no_sync():
        ck.cached_step(model, mine(*batch(10)), half, chunk=2, group="world")
    for seed in (20, 10):
        ck.cached_step(model, mine(*batch(seed)), half, chunk=2, group="world")
    return errors(model, one)


def cached_twice() -> dict[str, float]:
    """One model of DDP for both views, beside another for the third."""
    one = Encoder()
    images, texts = (DistributedDataParallel(copy.deepcopy(m)) for m in (one.images, one.texts))
    x, y, z = batch(10)[0], batch(20)[0], batch(30)[1]

    def loss(x: Tensor, y: Tensor, z: Tensor, group: str | None = None) -> Tensor:
        return ck.nt_xent(x, y, group=group) + ck.nt_xent(x, z, group=group)

    loss(one.images(x), one.images(y), one.texts(z)).backward()
    ck.cached_step((images, images, texts), mine(x, y, z), loss, chunk=2, group="world")
    model = nn.ModuleDict({"images": images.module, "texts": texts.module})
    one = nn.ModuleDict({"images": one.images, "texts": one.texts})
    return errors(model, one)


def cached_fsdp() -> dict[str, float]:
    """Ranks have 5 rows and 2, and must take equally many chunks."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    one, model = Encoder(), Features()
    for layer in (model.images, model.texts):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    one(*batch(10)).backward()
    ck.cached_step(model, mine(*batch(10)), of_features, chunk=2, group="world")
    return errors(model, one)


def cached_wrong() -> str:
    """What a loss is told that uses a parameter of DDP."""
    model = DistributedDataParallel(Features())

    def loss(x: Tensor, y: Tensor, *_: Tensor) -> Tensor:
        return ck.clip_loss(x, y, model.module.scale.exp())

    try:
        ck.cached_step(model, mine(*batch(10)), loss, chunk=2)
    except RuntimeError as error:
        return str(error)
    return "no error"


CACHED = {cached: 6, cached_and_accumulated: 6, cached_twice: 4, cached_fsdp: 6}


def queues() -> dict[str, bool]:
    """Queues over the ranks beside one queue that sees all features."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    seed = torch.Generator().manual_seed
    one = ck.FeatureQueue(12, 5, dtype=torch.float64, generator=seed(0))
    copies = ck.FeatureQueue(12, 5, dtype=torch.float64, generator=seed(0), group=group)
    parts = ck.FeatureQueue(
        12, 5, dtype=torch.float64, generator=seed(0), group=group, sharded=True
    )
    report = {"copies": True, "parts": True, "losses": True}
    for step, sizes in enumerate(((5, 2), (0, 3), (9, 8), (1, 0))):
        rows = randn(sum(sizes), 5, seed=step)
        own = rows[sum(sizes[:rank]) :][: sizes[rank]]
        x, y = (randn(6, 5, seed=100 + step + i).requires_grad_() for i in (0, 50))
        whole = ck.info_nce(x, y, negatives=one.negatives)
        mine = [t.detach()[3 * rank : 3 * rank + 3].requires_grad_() for t in (x, y)]
        for queue, sharded in ((copies, False), (parts, True)):
            loss = ck.info_nce(
                *mine, negatives=queue.negatives, group=group, sharded_negatives=sharded
            )
            got = torch.autograd.grad(loss, mine)
            wanted = torch.autograd.grad(whole, (x, y), retain_graph=True)
            for a, b in zip((loss, *got), (whole, *wanted), strict=True):
                b = b[3 * rank : 3 * rank + 3] * world if b.dim() else b
                report["losses"] &= (a - b).abs().max().item() < 1e-12
        one.enqueue(rows)
        copies.enqueue(own)
        parts.enqueue(own)
        report["copies"] &= torch.equal(copies.negatives, one.negatives)
        report["parts"] &= torch.equal(parts.negatives, one.negatives.chunk(world)[rank])
        report["parts"] &= parts.filled == one.filled
    drawn = ck.FeatureQueue(12, 5, group=group).negatives
    everywhere = [torch.empty_like(drawn) for _ in range(world)]
    dist.all_gather(everywhere, drawn)
    report["start"] = all(torch.equal(t, drawn) for t in everywhere)
    return report


def bank() -> dict[str, bool]:
    """A bank over the ranks, in a model of DDP, beside one bank that sees all samples."""
    rank, group = dist.get_rank(), dist.group.WORLD
    seed = torch.Generator().manual_seed

    class Model(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 5, dtype=torch.float64)
            self.bank = ck.MemoryBank(9, 5, dtype=torch.float64, generator=seed(0), group=group)

    one = ck.MemoryBank(9, 5, dtype=torch.float64, generator=seed(0))
    model = torch.nn.parallel.DistributedDataParallel(Model())
    report = {"equal": True}
    for step, sizes in enumerate(((3, 2), (0, 4), (6, 6))):
        rows, indices = randn(sum(sizes), 5, seed=step), torch.arange(sum(sizes)) * 2 % 9
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        model(randn(2, 5, seed=step)).sum().backward()  # copies the buffers of rank 0
        one.update(indices, rows)
        model.module.bank.update(indices[own], rows[own])
        report["equal"] &= torch.equal(model.module.bank.features, one.features)
    drawn = ck.MemoryBank(9, 5, group=group).features
    everywhere = [torch.empty_like(drawn) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, drawn)
    report["start"] = all(torch.equal(t, drawn) for t in everywhere)
    return report


def compiled() -> float:
    """Error of the gradient of a compiled step, whose graph breaks at the loss."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        return 2 * ck.clip_loss(x.sin(), y, 3.0, group=dist.group.WORLD)

    x, y = mine(randn(20, 5, seed=1), randn(20, 5, seed=2))
    found = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(function(leaf, y), leaf)[0])
    return (found[0] - found[1]).abs().max().item()


def modules() -> dict[str, float]:
    """Errors of modules with a group, over two batches: NCE keeps the Z of its first."""

    def error(module: type, inputs: int, *more: Tensor, **options) -> float:
        one, each = module(**options), module(**options, group=dist.group.WORLD)
        batches = [[batch(seed + i)[0] for i in range(inputs)] for seed in (20, 30)]
        pairs = [(one(*whole, *more), each(*mine(*whole), *more)) for whole in batches]
        return max((a - b).abs().item() for a, b in pairs)

    return {
        "NCE": error(ck.NCE, 2, randn(3, 6, seed=9), num_data=50),
        "MNRL": error(ck.MNRL, 2, scale=3.0, directions=("query_to_doc", "doc_to_doc")),
        "GIST": error(ck.GIST, 4, scale=3.0),
    }


def kept_groups() -> dict[str, bool]:
    """Modules that hold a group are copied and saved, and the copy finds its group again."""
    group = dist.group.WORLD
    ranks = list(range(dist.get_world_size()))
    part = dist.new_group(ranks)  # not the default group
    mesh = init_device_mesh("cpu", (len(ranks),))
    x, y = mine(batch(20)[0], batch(30)[0])
    wanted = ck.nt_xent(x, y, group=group)
    report = {}
    for name, given in (("world", "world"), ("WORLD", group), ("part", part), ("mesh", mesh)):
        report[f"{name}, function"] = torch.equal(ck.nt_xent(x, y, group=given), wanted)
        module = ck.NTXent(group=given)
        queue = ck.FeatureQueue(8, 6, group=given, sharded=True)
        saved = io.BytesIO()
        torch.save((module, queue), saved)
        saved.seek(0)
        copies = {
            "itself": (module, queue),
            "deepcopy": copy.deepcopy((module, queue)),
            "pickle": pickle.loads(pickle.dumps((module, queue))),
            "torch.save": torch.load(saved, weights_only=False),
            "average": (AveragedModel(module).module, AveragedModel(queue).module),
        }
        for how, (loss, store) in copies.items():
            store.enqueue(x.float())
            report[f"{name}, {how}"] = torch.equal(loss(x, y), wanted)
            report[f"{name}, {how}, queue"] = torch.equal(store.features, queue.features)
    return report


def whitening() -> float:
    """Error of a whitening layer whose running covariance DDP copies from rank 0 after a use."""
    layer = ck.Whitening(4, affine=True)
    model = DistributedDataParallel(layer)
    model(randn(9, 4, seed=dist.get_rank(), dtype=torch.float32)).sum().backward()
    model.eval()
    x = randn(3, 4, dtype=torch.float32)
    layer(x)  # without DDP, by this rank's covariance
    again = ck.Whitening(4, affine=True).eval()
    found = model(x)
    again.load_state_dict(layer.state_dict())
    return (found - again(x)).abs().max().item()


def copied_modules() -> dict[str, bool]:
    """Copies of every module of the table that holds a group beside the module itself."""
    group = dist.new_group(list(range(dist.get_world_size())))
    report = {}
    for name in sorted(FIRST):
        made = Setup(name, "even", "gather", "mean").prepare()
        module, saved = made.row.module(group=group), io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(saved, weights_only=False),
            AveragedModel(module).module,
        ]
        losses = [call(m, made.case, made.mine, reduction="mean") for m in (module, *copies)]
        report[name] = all(torch.equal(loss, losses[0]) for loss in losses)
        report[name] &= torch.equal(losses[0], made.each(made.mine))
    return report


def everything() -> dict[str, dict | float]:
    """All that one start of the processes computes."""
    trainings = {f.__name__: f() for f in (ddp, accumulated, fsdp, *CACHED)}
    return {
        "trainings": trainings,
        "cached wrong": cached_wrong(),
        "queues": queues(),
        "bank": bank(),
        "modules": modules(),
        "compiled": compiled(),
        "kept groups": kept_groups(),
        "whitening": whitening(),
        "copied modules": copied_modules(),
    }
