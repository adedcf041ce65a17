"""MoCo's loop (logits and labels, a queue of keys) on scikit-learn's digits, and two lines of ours.

    pip install scikit-learn tqdm
    python examples/swap_moco.py [steps] [size of the queue]

MoCo returns the logits (N, 1 + K) and leaves the cross-entropy to the trainer, so no patch can
fuse them. The lines that change are marked; accuracies come from `stats.rank`.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from beside import compare
from sklearn.datasets import load_digits
from torch import Tensor, nn

import contrastive_kernels as ck

BATCH, DIM, TEMPERATURE, MOMENTUM = 256, 128, 0.07, 0.99


def dense_step(query: Tensor, key: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and top-1 accuracy as MoCo's trainer makes them."""
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat((positive, query @ queue.clone().T), 1) / TEMPERATURE
    labels = torch.zeros(len(query), dtype=torch.long)
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def fused_step(query: Tensor, key: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """The same without logits: the two lines."""
    loss, stats = ck.info_nce(
        query, key, negatives=queue, temperature=TEMPERATURE, normalize=False, return_stats=True
    )
    return loss, (stats.rank < 1).float().mean()  # top-5: stats.rank < 5


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.SiLU(), nn.Linear(256, DIM)
    )


def train(step: Callable, size: int, steps: int, on_step: Callable[[float], None]) -> None:
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    query_encoder = encoder()
    key_encoder = copy.deepcopy(query_encoder)
    queue = ck.FeatureQueue(size, DIM)
    optimizer = torch.optim.SGD(query_encoder.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        batch = images[torch.randperm(len(images))[:BATCH]]
        first, second = (batch + 0.15 * torch.randn_like(batch) for _ in range(2))
        query = F.normalize(query_encoder(first), dim=1)
        with torch.no_grad():
            for slow, fast in zip(
                key_encoder.parameters(), query_encoder.parameters(), strict=True
            ):
                slow.lerp_(fast, 1 - MOMENTUM)
            key = F.normalize(key_encoder(second), dim=1)
        loss, _accuracy = step(query, key, queue.negatives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.enqueue(key)  # after the backward pass
        on_step(loss.item())


def main(steps: int = 30, size: int = 65536) -> float:
    runs = {"dense logits": dense_step, "fused": fused_step}
    return compare({name: partial(train, step, size, steps) for name, step in runs.items()}, steps)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))
