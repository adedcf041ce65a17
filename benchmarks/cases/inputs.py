"""Inputs of the cases, as functions of their sizes: float32, the same for the same generator."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

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

    def with_rows(self, n: int) -> "Sizes":
        """n rows, m in proportion."""
        return replace(self, n=n, m=max(1, self.m * n // self.n))

    def at_most(self, n: int, m: int) -> "Sizes":
        fewer = self.with_rows(min(self.n, n))
        return replace(fewer, m=min(fewer.m, m))

    def quick(self) -> "Sizes":
        """Sizes that take a fraction of a second."""
        return self.at_most(2048, 8192)

    def tiny(self) -> "Sizes":
        """Sizes that show whether anything works at all."""
        return self.at_most(256, 1024)


@dataclass(frozen=True)
class Groups(Sizes):
    """n groups of m samples, which stay whole."""

    def with_rows(self, n: int) -> "Groups":
        return replace(self, n=n)

    def quick(self) -> "Groups":
        return self.with_rows(min(self.n, 8))

    def tiny(self) -> "Groups":
        return self.quick()


@dataclass(frozen=True)
class Samples(Sizes):
    """n samples, cut into groups of m by an option of the loss."""

    def with_rows(self, n: int) -> "Samples":
        return replace(self, n=n)

    def quick(self) -> "Samples":
        return self

    def tiny(self) -> "Samples":
        return self.with_rows(self.m)


class Inputs(NamedTuple):
    """How tensors are made, and which sizes they depend on."""

    make: Callable[[Sizes, torch.Generator], Tensors]
    sizes: frozenset[str]

    def __call__(self, sizes: Sizes, generator: torch.Generator) -> Tensors:
        return self.make(sizes, generator)


def of_sizes(names: str) -> Callable[[Callable[[Sizes, torch.Generator], Tensors]], Inputs]:
    """Declares the sizes, one letter each, that the tensors of a function depend on."""
    return lambda make: Inputs(make, frozenset(names))


def pairs(first: str, second: str) -> Inputs:
    """Two sets of n features, row i of the one related to row i of the other (cosine 0.7)."""

    @of_sizes("nd")
    def make(sizes: Sizes, generator: torch.Generator) -> Tensors:
        x = torch.randn(sizes.n, sizes.d, generator=generator)
        return {first: x, second: x + torch.randn(sizes.n, sizes.d, generator=generator)}

    return make


def unit_rows(count: int, dim: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, dim, generator=generator)
    return x.div_(x.norm(dim=1, keepdim=True))


@of_sizes("nmd")
def queue(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """Pairs, and m negatives of unit length as they lie in a queue."""
    tensors = pairs("query", "key")(sizes, generator)
    return tensors | {"negatives": unit_rows(sizes.m, sizes.d, generator)}


@of_sizes("nd")
def image_text(sizes: Sizes, generator: torch.Generator) -> Tensors:
    tensors = pairs("image_features", "text_features")(sizes, generator)
    return tensors | {"logit_scale": torch.tensor(1 / 0.07)}


@of_sizes("nd")
def image_text_bias(sizes: Sizes, generator: torch.Generator) -> Tensors:
    tensors = image_text(sizes, generator)
    return tensors | {"logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}


@of_sizes("nd")
def ranked(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n queries, and the document of each; then as many of nobody."""
    tensors = pairs("query", "documents")(sizes, generator)
    others = torch.randn(sizes.n, sizes.d, generator=generator)
    return tensors | {"documents": torch.cat([tensors["documents"], others])}


@of_sizes("nd")
def labelled(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n features of 100 classes, fewer where a class would have a single feature."""
    return {
        "features": torch.randn(sizes.n, sizes.d, generator=generator),
        "labels": torch.randperm(sizes.n, generator=generator) % min(100, max(1, sizes.n // 2)),
    }


@of_sizes("ndk")
def positives(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n queries with k positives each."""
    query = torch.randn(sizes.n, sizes.d, generator=generator)
    noise = torch.randn(sizes.n, sizes.k, sizes.d, generator=generator)
    return {"query": query, "positives": query[:, None] + noise}


@of_sizes("nmdk")
def positives_and_negatives(sizes: Sizes, generator: torch.Generator) -> Tensors:
    tensors = positives(sizes, generator)
    return tensors | {"negatives": torch.randn(sizes.m, sizes.d, generator=generator)}


@of_sizes("ndk")
def related_views(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """k views of n samples."""
    x = torch.randn(sizes.n, sizes.d, generator=generator)
    return {"views": x + torch.randn(sizes.k, sizes.n, sizes.d, generator=generator)}


def views_and_permutations(count: int) -> Inputs:
    """k views of n samples, and orders of the samples."""

    @of_sizes("ndk")
    def make(sizes: Sizes, generator: torch.Generator) -> Tensors:
        orders = [torch.randperm(sizes.n, generator=generator) for _ in range(count)]
        return related_views(sizes, generator) | {"permutations": torch.stack(orders)}

    return make


@of_sizes("nkd")
def token_sets(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n queries of 32 tokens of unit length, with k documents of 180 each."""
    shapes = {"queries": (sizes.n, 32), "documents": (sizes.n, sizes.k, 180)}
    return {
        name: torch.nn.functional.normalize(
            torch.randn(*shape, sizes.d, generator=generator), dim=-1
        )
        for name, shape in shapes.items()
    }


@of_sizes("nmd")
def groups(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n groups of m samples."""
    return {"x": torch.randn(sizes.n, sizes.m, sizes.d, generator=generator)}


@of_sizes("nmd")
def groups_and_upstream(sizes: Sizes, generator: torch.Generator) -> Tensors:
    """n groups of m samples, and an upstream gradient related to them."""
    x = groups(sizes, generator)["x"]
    return {"x": x, "upstream": x + torch.randn(x.shape, generator=generator)}
