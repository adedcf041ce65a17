"""Every family of kernels on a few rows, and the same in float64: what `smoke` runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

import contrastive_kernels as ck
from contrastive_kernels import ops, reference
from contrastive_kernels.losses.cases import runs

# Not multiples of a tile, and more keys than one part takes.
ROWS, KEYS = 257, 1090
OWN_KEYS, GROUPS = 7, (6, 160)
QUERIES, DOCUMENTS, TOKENS = 9, 12, (20, 70)  # of a query, of a document
NEAREST = 10
# (results, by name) of a function of leaves, whose gradients are results too
Results = dict[str, Tensor]


def normal(*shape: int, seed: int, like: torch.dtype) -> Tensor:
    made = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=made, dtype=torch.float64, device="cpu").to(like)


class Inputs:
    """Leaves of a family: rounded for the kernels, and the same numbers in float64."""

    def __init__(self, dtype: torch.dtype, dim: int, device: str, exact: bool):
        self.dtype, self.dim, self.device, self.exact = dtype, dim, device, exact
        self.leaves: dict[str, Tensor] = {}

    def features(self, name: str, *shape: int, learned: bool = True) -> Tensor:
        t = normal(*shape, self.dim, seed=len(name) + len(shape), like=self.dtype)
        return self._leaf(name, t, learned)

    def numbers(self, name: str, *values: float) -> Tensor:
        dtype = torch.float64 if self.exact else torch.float32
        return self._leaf(name, torch.tensor(values, dtype=dtype), True)

    def _leaf(self, name: str, t: Tensor, learned: bool) -> Tensor:
        t = t.to(self.device)
        t = (t.double() if self.exact else t).detach().requires_grad_(learned)
        if learned:
            self.leaves[name] = t
        return t

    def ids(self, count: int, each: int) -> Tensor:
        return torch.arange(count, device=self.device) // each

    def differentiated(self, values: Results) -> Results:
        """The values, and gradients of the leaves for random upstream gradients, of one sign: a sum
        that cancels has a large relative error."""
        values = {name: t.masked_fill(t == -torch.inf, 0.0) for name, t in values.items()}
        chosen = [t for t in values.values() if t.requires_grad]
        upstream = [normal(*t.shape, seed=40 + k, like=t.dtype).abs().to(t.device)
                    for k, t in enumerate(chosen)]  # fmt: skip
        gradients = torch.autograd.grad(chosen, list(self.leaves.values()), upstream)
        names = (f"d{name}" for name in self.leaves)
        return values | dict(zip(names, gradients, strict=True))


def swept(
    *, itself: bool = False, frozen: bool = False, softplus: bool = False, biased: bool = False,
    normalize: bool = True, summed: bool = False, own: bool = False, **options: bool,
) -> Callable[[Inputs], Results]:  # fmt: skip
    """A family of sweeps: pairs of equal ids are dropped."""

    def run(given: Inputs) -> Results:
        x = given.features("x", ROWS)
        shape = (ROWS, OWN_KEYS) if own else (KEYS,)
        y = None if itself else given.features("y", *shape, learned=not frozen)
        scale = given.numbers("scale", 0.3 if not normalize else 9.0).reshape(())
        keys = ROWS if itself else shape[-1]
        pairs = {
            "scale": scale,
            "exclude": (given.ids(ROWS, 3), given.ids(keys, 2 if own else 11)),
            "normalize": normalize,
        }
        if itself:
            pairs["exclude"] = (pairs["exclude"][0],) * 2
        if biased:
            pairs["bias"] = given.numbers("bias", *(-1.0 + 0.01 * (k % 7) for k in range(keys)))
        if given.exact:
            sweep = reference.softplus_sweep if softplus else reference.sweep
            out = sweep(x, y, **pairs, **options)
        else:
            backend = "triton"
            checked = ops.checked_operands(x, y, backend=backend, **pairs)
            if softplus:
                out = ops.softplus_sweep(checked, summed=summed, **options)
            else:
                out = ops.sweep(checked, **options)
        names = ("value",) if softplus else ("lse", "mean", "col_lse", "col_mean")
        values = {name: getattr(out, name) for name in names}
        values = {name: t for name, t in values.items() if t is not None}
        if summed and given.exact:
            values = {"value": values["value"].sum()}
        return given.differentiated(values)

    return run


def row_dots(given: Inputs) -> Results:
    x = given.features("x", ROWS)
    counts = torch.tensor(runs(ROWS), device=given.device)
    one, own = given.features("one", ROWS, 1), given.features("own", ROWS, OWN_KEYS)
    ragged = given.features("ragged", int(counts.sum()))
    if given.exact:
        unit = torch.nn.functional.normalize
        rows = torch.arange(ROWS, device=given.device).repeat_interleave(counts)
        values = {name: reference.row_dot(x, y, normalize=True) for name, y in
                  (("pairs", one), ("keys", own))}  # fmt: skip
        values["runs"] = (unit(x, dim=1)[rows] * unit(ragged, dim=1)).sum(1)
    else:
        options = {"normalize": True, "backend": "triton"}
        values = {"pairs": ops.row_dot(x, one, **options), "keys": ops.row_dot(x, own, **options)}
        values["runs"] = ops.row_dot(x, ragged, ends=counts.cumsum(0), **options)
    return given.differentiated(values)


def few(given: Inputs) -> Results:
    """Rows and columns by one launch, and the logits of pairs where features are packed."""
    x, y = given.features("x", ROWS), given.features("y", ROWS + 1)
    scale = given.numbers("scale", 9.0).reshape(())
    pairs = {"scale": scale, "exclude": (given.ids(ROWS, 3), given.ids(ROWS + 1, 11))}
    pairs |= {"normalize": True}
    if given.exact:
        out = reference.sweep(x, y, **pairs, columns=True)
        dots = reference.row_dot(x, y[:ROWS, None], normalize=True)[:, 0]
        return given.differentiated({"lse": out.lse, "col_lse": out.col_lse, "pos": scale * dots})
    backends = sys.modules["contrastive_kernels.backends"]
    with patch.object(backends, "FEW_PRODUCTS", backends.LAUNCH_BOUND):
        out = ops.sweep(ops.operands(x, y, **pairs, backend="triton", aligned=True), columns=True)
        return given.differentiated({"lse": out.lse, "col_lse": out.col_lse, "pos": out.partner})


def prefixes(given: Inputs) -> Results:
    """Rows and columns at two prefixes of the features at once, and the logits of pairs."""
    x, y = given.features("x", ROWS), given.features("y", KEYS)
    scale = given.numbers("scale", 9.0).reshape(())
    pairs = {"scale": scale, "exclude": (given.ids(ROWS, 3), given.ids(KEYS, 11))}
    pairs |= {"normalize": True}
    ends = (given.dim // 2, given.dim)
    if not given.exact:
        nested = ops.operands(x, y, **pairs, backend="triton", aligned=True, ends=ends)
        out = ops.sweep(nested, columns=True)
        return given.differentiated({"lse": out.lse, "col_lse": out.col_lse, "pos": out.partner})
    parts = []
    for end in ends:
        short, keys = x[:, :end], y[:, :end]
        one = reference.sweep(short, keys, **pairs, columns=True)
        dots = reference.row_dot(short, keys[:ROWS, None], normalize=True)[:, 0]
        parts.append((one.lse, one.col_lse, scale * dots))
    names = ("lse", "col_lse", "pos")
    whole = (torch.stack(each) for each in zip(*parts, strict=True))
    return given.differentiated(dict(zip(names, whole, strict=True)))


def nearest(given: Inputs) -> Results:
    """Values alone: of two products that differ by rounding either may come first."""
    x = given.features("x", ROWS, learned=False)
    y = given.features("y", KEYS, learned=False)
    exclude = (given.ids(ROWS, 3), given.ids(KEYS, 11))
    options = {"exclude": exclude, "normalize": True}
    if given.exact:
        return {"values": reference.top_k(x, y, NEAREST, **options).values}
    return {"values": ops.top_k(x, y, NEAREST, backend="triton", **options).values}


def late(temperature: float | None) -> Callable[[Inputs], Results]:
    """Late interaction, of tokens that may not count."""

    def run(given: Inputs) -> Results:
        x = given.features("queries", QUERIES, TOKENS[0])
        y = given.features("documents", DOCUMENTS, TOKENS[1])
        options = {
            "query_mask": given.ids(QUERIES * TOKENS[0], 1).reshape(x.shape[:2]) % 7 > 0,
            "document_mask": given.ids(DOCUMENTS * TOKENS[1], 1).reshape(y.shape[:2]) % 5 > 0,
            "temperature": temperature, "normalize": True,
        }  # fmt: skip
        if given.exact:
            return given.differentiated({"scores": reference.max_sim(x, y, **options)})
        return given.differentiated({"scores": ops.max_sim(x, y, **options, backend="triton")})

    return run


def whitening(given: Inputs) -> Results:
    x = given.features("x", *GROUPS)
    return given.differentiated({"result": (reference if given.exact else ck).whiten(x, eps=0.1)})


def on_hopper(family: Callable[[Inputs], Results]) -> Callable[[Inputs], Results]:
    """By the engine for Hopper, which has to be asked for, and as many pairs are swept."""

    def run(given: Inputs) -> Results:
        backends = sys.modules["contrastive_kernels.backends"]
        asked = patch.dict(os.environ, CK_HOPPER="1")
        with asked, patch.object(backends, "FEW_PRODUCTS", 0):
            return family(given)

    return run


FAMILIES: dict[str, Callable[[Inputs], Results]] = {
    "rows": swept(mean=True, biased=True),
    "columns": swept(columns=True, biased=True),
    "two_way": swept(columns=True),
    "itself": swept(itself=True),
    "attend": swept(frozen=True),
    "gradient": swept(normalize=False),
    "softplus": swept(softplus=True, biased=True),
    "softplus_sum": swept(softplus=True, summed=True),
    "own_keys": swept(own=True),
    "row_dot": row_dots,
    "few": few,
    "prefixes": prefixes,
    "nearest": nearest,
    "late_interaction": late(None),
    "late_interaction_smooth": late(0.1),
    "whitening": whitening,
    # the last: if they never end, the others are known
    "hopper": on_hopper(swept(frozen=True)),
    "hopper_gradient": on_hopper(swept()),
    "hopper_both": on_hopper(swept(columns=True)),
}


def whitened(dtype: torch.dtype, dim: int) -> bool:
    """What the CUDA kernels of whitening take."""
    return dtype == torch.float32 and dim < GROUPS[1]
