"""Sharded queues as members of a trained model: moved, copied, saved and loaded on other ranks."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracles import generator, randn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import contrastive_kernels as ck

SIZE, DIM = 12, 5
WHOLE = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """MoCo in small; `group` None: one queue, of this process alone."""

    def __init__(
        self, group: object = "world", sharded: bool = True, size: int = SIZE, **options
    ) -> None:
        super().__init__()
        self.net = nn.Linear(4, DIM, bias=False, dtype=torch.float64)
        self.queue = ck.FeatureQueue(
            size, DIM, dtype=torch.float64, group=group, sharded=sharded, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def one(steps: int = 3) -> ck.FeatureQueue:
    """One queue that saw what the ranks' queues see: more than it holds."""
    queue = ck.FeatureQueue(SIZE, DIM, dtype=torch.float64, generator=generator(5))
    for step in range(steps):
        queue.enqueue(batch(step))
    return queue


def batch(step: int) -> Tensor:
    return randn(7, DIM, seed=step)


def own(queue: ck.FeatureQueue, step: int) -> Tensor:
    """What this rank gives a queue at a step."""
    if queue.group is None:
        return batch(step)
    return batch(step).tensor_split(dist.get_world_size())[dist.get_rank()]


def enqueue(queue: ck.FeatureQueue, step: int) -> None:
    queue.enqueue(own(queue, step))


def trained(wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> nn.Module:
    model = wrap(Model(generator=generator(5)))
    for step in range(3):
        model(randn(2, 4, seed=step + dist.get_rank())).sum().backward()
        enqueue(inner(model).queue, step)
    model(randn(2, 4))  # a forward sends buffers
    return model


def inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def holds(queue: ck.FeatureQueue, whole: ck.FeatureQueue) -> bool:
    """Whether a queue, or a rank's part of it, is `whole`."""
    rows = whole.negatives
    if queue.sharded:
        rows = rows.chunk(dist.get_world_size())[dist.get_rank()]
    equal = torch.equal(queue.negatives, rows.to(queue.negatives.dtype))
    return equal and (queue.position, queue.seen) == (whole.position, whole.seen)


def goes_on(queue: ck.FeatureQueue) -> bool:
    """Whether it is the queue of three steps, and of four after another one."""
    before = holds(queue, one())
    enqueue(queue, 3)
    return before and holds(queue, one(4))


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_without_broadcast(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def plain(model: nn.Module) -> nn.Module:
    return model


WRAPPERS = (plain, ddp, ddp_without_broadcast, fsdp)


def losses() -> dict[str, bool]:
    """The loss with the queue of a model, of two steps of training, beside one process."""
    world, rank, report = dist.get_world_size(), dist.get_rank(), {}
    x, y = randn(2 * world, DIM, seed=8), randn(2 * world, DIM, seed=9)
    wanted = ck.info_nce(x, y, negatives=one().negatives)
    for wrap in WRAPPERS:
        queue = inner(trained(wrap)).queue
        mine = (t[2 * rank : 2 * rank + 2] for t in (x, y))
        options = {"negatives": queue.negatives, "sharded_negatives": True, "group": "world"}
        error = (ck.info_nce(*mine, **options) - wanted).abs().item()
        report[wrap.__name__] = error < 1e-12 and holds(queue, one())
    return report


def moves() -> dict[str, bool]:
    """What nn.Module does with tensors it does to a part."""
    report = {}
    model, saved = trained(), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
        "average": AveragedModel(model).module,
        "to": copy.deepcopy(model).to("cpu"),
    }
    averaged = AveragedModel(model)
    enqueue(model.queue, 3)
    averaged.update_parameters(model)
    copies["average later"] = averaged.module
    report |= {how: goes_on(each.queue) for how, each in copies.items()}
    half = trained().half().queue
    report["half"] = half.negatives.dtype == torch.float16
    report["half"] &= torch.equal(half.negatives, trained().queue.negatives.half())
    half.enqueue(batch(3).float())
    report["another dtype"] = half.negatives.dtype == torch.float32
    meta = Model(device="meta")
    report["meta"] = meta.queue.negatives.is_meta
    meta.queue.to_empty(device="cpu").reset_parameters()
    norms = meta.queue.negatives.norm(dim=1)
    report["meta"] &= torch.allclose(norms, torch.ones_like(norms)) and meta.queue.filled == 0
    model = trained()
    for mode in (torch.no_grad, torch.inference_mode):
        other = Model()
        with mode():
            other.load_state_dict(copy.deepcopy(model.state_dict()))
            report[mode.__name__] = goes_on(other.queue)
    other = Model()
    other.load_state_dict(model.state_dict(), assign=True)
    report["assigned"] = goes_on(other.queue) and holds(model.queue, one())
    compiled = torch.compile(model.queue.enqueue, backend="aot_eager")
    compiled(own(model.queue, 3))
    report["compiled"] = holds(model.queue, one(4))
    return report


def raised(function: Callable[[], object]) -> str:
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """Errors of a queue that is not the same one on every rank."""
    rank, group = dist.get_rank(), dist.group.WORLD
    model = Model()
    if rank == 0:
        model.load_state_dict(one_state())
    report = {"loaded by one": raised(lambda: enqueue(model.queue, 3))}
    sent = [pickle.dumps(trained().queue)]
    dist.broadcast_object_list(sent, group=group)
    queue = pickle.loads(sent[0])
    return report | {"module of another rank": raised(lambda: enqueue(queue, 3))}


def one_state() -> dict[str, Tensor]:
    model = Model(group=None, sharded=False)
    model.queue.load_state_dict(one().state_dict())
    return model.state_dict()


def save(folder: Path) -> None:
    """One trained model, in all ways."""
    rank, model = dist.get_rank(), trained(ddp)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    dcp.save({"model": get_model_state_dict(trained(fsdp))}, checkpoint_id=folder / "fsdp")
    torch.save(model.module.state_dict(), folder / f"rank{rank}.pt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
        torch.save(one_state(), folder / "one.pt")
        (folder / "module.pkl").write_bytes(pickle.dumps(model.module))
    dcp.save({"model": one_state()}, checkpoint_id=folder / "one")
    dist.barrier()


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def load(folder: Path) -> dict[str, bool]:
    """The model that another number of ranks saved, in all ways, into each kind of queue."""
    report, rank = {}, dist.get_rank()

    def add(how: str, make: Callable[[], nn.Module], fill: Callable[[nn.Module], object]) -> None:
        model = make()
        fill(model)
        report[f"{how}, {make.__name__}"] = goes_on(inner(model).queue)

    def from_dcp(model: nn.Module, name: str) -> None:
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder / name)
        set_model_state_dict(model, state["model"])

    def from_each(model: nn.Module, name: str = "whole.pt") -> None:
        set_model_state_dict(model, read(folder / name), options=WHOLE)

    def from_rank_0(model: nn.Module) -> None:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, read(folder / "whole.pt") if rank == 0 else {}, options=options)

    def sharded() -> nn.Module:
        return Model()

    def unsharded() -> nn.Module:
        return Model(group=None, sharded=False)

    def copies() -> nn.Module:
        return Model(sharded=False)

    def in_ddp() -> nn.Module:
        return ddp(Model())

    def in_fsdp() -> nn.Module:
        return fsdp(Model())

    for make in (sharded, unsharded, copies, in_ddp, in_fsdp):
        add("dcp", make, lambda model: from_dcp(model, "dcp"))
        add("dcp of fsdp", make, lambda model: from_dcp(model, "fsdp"))
        add("dcp of one", make, lambda model: from_dcp(model, "one"))
        add("whole, set", make, from_each)
        add("one, set", make, lambda model: from_each(model, "one.pt"))
        add("whole, rank 0", make, from_rank_0)
    for make in (sharded, unsharded, copies):
        for name in ("whole.pt", "one.pt"):
            add(name, make, lambda model, n=name: model.load_state_dict(read(folder / n)))

    def meta() -> nn.Module:
        return Model(device="meta")

    add("assigned", meta, lambda model: model.load_state_dict(read(folder / "one.pt"), assign=True))
    return report


def load_parts(folder: Path, files: int) -> list[dict[str, object]]:
    """What the files of single ranks do on this one."""
    report = []
    for i in range(files):
        state, model, lenient = read(folder / f"rank{i}.pt"), Model(), Model()
        before = lenient.queue.negatives.clone()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lenient.load_state_dict(state, strict=False)
        now = lenient.queue
        report.append({
            "error": raised(lambda m=model, s=state: m.load_state_dict(s)),
            "warned": [str(w.message) for w in said],
            "loaded": (now.negatives == one().negatives[now.rows]).all(1).tolist(),
            "kept": (now.negatives == before).all(1).tolist(),
        })  # fmt: skip
    return report


def submeshes() -> dict[str, bool]:
    """Queues of pairs of ranks, each over its own two, in a model that DDP has on all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "within"))
    pair, within = mesh.get_local_rank("pair"), mesh.get_local_rank("within")
    model = ddp(Model(group=mesh["within"], generator=generator(5)))
    one = ck.FeatureQueue(SIZE, DIM, dtype=torch.float64, generator=generator(5))
    for step in range(3):
        model(randn(2, 4)).sum().backward()
        rows = batch(10 * pair + step)
        model.module.queue.enqueue(rows.tensor_split(2)[within])
        one.enqueue(rows)
    model(randn(2, 4))
    queue = model.module.queue
    state = queue.state_dict()
    whole = state["features"].full_tensor()
    again = Model(group=mesh["within"]).queue
    again.load_state_dict(copy.deepcopy(state))
    return {
        "parts": torch.equal(queue.negatives, one.negatives.chunk(2)[within]),
        "whole": torch.equal(whole, one.negatives),
        "loaded": torch.equal(again.negatives, queue.negatives),
        "copy": torch.equal(copy.deepcopy(queue).negatives, queue.negatives),
    }


def everything(root: Path, of: tuple[int, ...], saves: bool) -> dict[str, object]:
    """All that one start of the processes does; `of`: how many ranks saved before."""
    world = dist.get_world_size()
    report: dict[str, object] = {"loaded": {each: load(root / str(each)) for each in of}}
    if world == 2:
        report |= {"losses": losses(), "moves": moves(), "refusals": refusals()}
    if world == 4:
        report["submeshes"] = submeshes()
    if saves:
        save(root / str(world))
    if world > 1:
        report["parts"] = load_parts(root / "2", 2)
    return report
