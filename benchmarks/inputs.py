"""Inputs of the cases, as functions of their sizes: float32, the same for the same generator."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .oracle import Tensors


@dataclass(frozen=True)
class Sizes:
    """n rows (pairs of views where there are two), m columns, d features, k views or positives."""

    n: int
    m: int
    d: int = 128
    k: int = 1

    def quick(self) -> "Sizes":
        """Sizes for a smoke run: at most 256 rows, m in proportion."""
        n = min(self.n, 256)
        return replace(self, n=n, m=min(self.m * n // self.n, 16384))


@dataclass(frozen=True)
class Groups(Sizes):
    """n groups of m samples, which stay whole in a smoke run."""

    def quick(self) -> "Groups":
        return replace(self, n=min(self.n, 8))


Inputs = Callable[[Sizes, torch.Generator], Tensors]


def pairs(first: str, second: str) -> Inputs:
    """Two sets of n features, row i of the one related to row i of the other (cosine 0.7)."""

    def make(sizes: Sizes, generator: torch.Generator) -> Tensors:
        x = torch.randn(sizes.n, sizes.d, generator=generator)
        return {first: x, second: x + torch.randn(sizes.n, sizes.d, generator=generator)}

    return make


def unit_rows(count: int, dim: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, dim, generator=generator)
    return x.div_(x.norm(dim=1, keepdim=True))


def queue(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Pairs, and m negatives of unit length as they lie in a queue."""
    tensors = pairs("query", "key")(sizes, generator)
    return tensors | {"negatives": unit_rows(sizes.m, sizes.d, generator)}


def image_text(sizes: Sizes, generator: torch.Generator) -> Tensors:
    tensors = pairs("image_features", "text_features")(sizes, generator)
    return tensors | {"logit_scale": torch.tensor(1 / 0.07)}


def image_text_bias(sizes: Sizes, generator: torch.Generator) -> Tensors:
    tensors = image_text(sizes, generator)
    return tensors | {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}


def labelled(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n features of 100 classes, no class with a single feature."""
    return {
        "features": torch.randn(sizes.n, sizes.d, generator=generator),
        "labels": torch.randperm(sizes.n, generator=generator) % 100,
    }


def positives(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n queries with k positives each."""
    query = torch.randn(sizes.n, sizes.d, generator=generator)
    noise = torch.randn(sizes.n, sizes.k, sizes.d, generator=generator)
    return {"query": query, "positives": query[:, None] + noise}


def positives_and_negatives(sizes: Sizes, generator: torch.Generator) -> Tensors:
    tensors = positives(sizes, generator)
    return tensors | {"negatives": torch.randn(sizes.m, sizes.d, generator=generator)}


def related_views(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """k views of n samples."""
    x = torch.randn(sizes.n, sizes.d, generator=generator)
    return {"views": x + torch.randn(sizes.k, sizes.n, sizes.d, generator=generator)}


def views_and_permutations(count: int) -> Inputs:
    """k views of n samples, and orders of the samples."""

    def make(sizes: Sizes, generator: torch.Generator) -> Tensors:
        orders = [torch.randperm(sizes.n, generator=generator) for _ in range(count)]
        return related_views(sizes, generator) | {"permutations": torch.stack(orders)}

    return make


def groups(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n groups of m samples."""
    return {"x": torch.randn(sizes.n, sizes.m, sizes.d, generator=generator)}


def groups_and_upstream(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n groups of m samples, and an upstream gradient related to them."""
    x = groups(sizes, generator)["x"]
    return {"x": x, "upstream": x + torch.randn(x.shape, generator=generator)}
