"""CLIP on several processes: handwritten digits beside their names.

    torchrun --nproc-per-node 2 examples/clip_ddp.py

Each process has its own half of every batch, and every image meets the words of all of them. Words
come more than once in a batch: their ids are excluded, over processes too. Under DDP's mean of the
gradients the training is that of one process with the whole batch; run it with 1 to see so. Needs
scikit-learn.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import contrastive_kernels as ck

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BATCH = 120


class Clip(nn.Module):
    """Images (N, 64) and words as letters (N, 5), into 16 shared features."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.letters = nn.EmbeddingBag(5 * 27, 16, mode="sum")
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor, words: Tensor, labels: Tensor) -> Tensor:
        return ck.info_nce(
            self.images(images), self.letters(words), scale=self.log_scale.exp(), symmetric=True,
            exclude=(labels, labels), group=dist.group.WORLD,
        )  # fmt: skip


def encode(word: str) -> list[int]:
    """A number for each letter at each of 5 places."""
    return [27 * place + ord(letter) - 96 for place, letter in enumerate(word.ljust(5, "`"))]


def main(epochs: int) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # every process starts the same, and shuffles the same
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    words = torch.tensor([encode(word) for word in WORDS])
    train, test = slice(0, 1500), slice(1500, None)

    model = Clip()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(epochs):
        losses = []
        for batch in torch.randperm(1500).split(BATCH):
            mine = batch.tensor_split(world)[rank]
            loss = parallel(images[train][mine], words[labels[train][mine]], labels[train][mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.6f}")
    with torch.no_grad():
        x, y = model.images(images[test]), model.letters(words)
        right = (nn.functional.normalize(x) @ nn.functional.normalize(y).T).argmax(1)
    if rank == 0:
        print(f"nearest word is right: {(right == labels[test]).double().mean():.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
