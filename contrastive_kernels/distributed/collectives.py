"""The collectives of `torch.distributed` that losses need, each usable in a graph of autograd or
of torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:  # not there in a torch without torch.distributed
    from torch.distributed import ProcessGroup


def all_gather(rows: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all ranks, equal in shape, one after the other along the first dimension."""
    import torch.distributed._functional_collectives as collectives

    # renamed in torch 2.13
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    return collectives.wait_tensor(gather(rows.contiguous(), 0, group))


def all_gather_objects(mine: Any, group: ProcessGroup) -> list[Any]:
    """The objects of all ranks, pickled."""
    from torch.distributed import all_gather_object

    everywhere: list[Any] = [None] * group.size()
    all_gather_object(everywhere, mine, group)
    return everywhere


def tell(error: Exception | None, group: ProcessGroup) -> None:
    """Every rank says what it raised, one at least has.

    Raises:
        ValueError: of the others' errors, on a rank that has none.
    """
    mine = None if error is None else f"{type(error).__name__}: {error}"
    errors = enumerate(all_gather_objects(mine, group))
    if error is None:
        raise ValueError(
            "; ".join(f"rank {rank} of group raised {e}" for rank, e in errors if e is not None)
        )


def all_to_all(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Rows for every rank, `sent` of them to each, against theirs, `received` from each."""
    import torch.distributed._functional_collectives as collectives

    return collectives.wait_tensor(
        collectives.all_to_all_single(rows.contiguous(), received, sent, group)
    )


def all_reduce(value: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of a tensor over the ranks."""
    import torch.distributed._functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(value, "sum", group))
