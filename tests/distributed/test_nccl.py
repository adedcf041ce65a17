"""Losses over NCCL, with a rank for each GPU of the machine."""

import gloo
import pytest
import torch
import torch.distributed as dist
from oracles import DEVICE

import contrastive_kernels as ck

LOSSES = (ck.nt_xent, ck.info_nce, ck.dcl)  # half of the pairs, one direction, another algebra


def differences(device: str) -> dict[tuple[str, str], float]:
    """Of value and gradients on this rank from those of one process, with uneven shards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [3 + r for r in range(world)]
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(sum(sizes), 24, dtype=torch.float64, generator=generator) for _ in range(2)
    ]
    found = {}
    for loss in LOSSES:
        everything = [t.to(device, copy=True).requires_grad_() for t in whole]
        expected = loss(*everything, backend="reference")
        expected.backward()
        for exchange in ("gather", "ring"):
            own = [t.split(sizes)[rank].to(device, copy=True).requires_grad_() for t in whole]
            value = loss(*own, group=dist.group.WORLD, exchange=exchange)
            value.backward()
            errors = [(value - expected).abs()]
            for part, t in zip(own, everything, strict=True):
                errors.append((part.grad / world - t.grad.split(sizes)[rank]).abs().max())
            found[loss.__name__, exchange] = torch.stack(errors).max().item()
    return found


@pytest.mark.skipif(DEVICE != "cuda", reason="NCCL needs a GPU")
def test_value_and_gradients_over_nccl():
    world = torch.cuda.device_count()
    for found in gloo.run(world, differences, "cuda", backend="nccl"):
        assert len(found) == 2 * len(LOSSES) and max(found.values()) < 1e-10, found
