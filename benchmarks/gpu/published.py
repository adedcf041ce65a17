"""Published speeds of attention's forward pass, and what the model of sweeps gives for them.

Attention is `attend` with a running maximum: two products of 2 N M D. All are without a causal
mask, in half precision, at a sequence of 16,384. A tile of n keys takes 3.5 ordinary instructions a
pair (scale and shift, maximum, sum, half a conversion) and D / n that rescale the weighted sum;
those of Triton are counted from the machine code of such a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

from .model import A100, H100, H100_SYNC, Machine, Tile, arithmetic_cycles, throughput, wgmma_cycles

FA3 = "Shah et al. 2024, arXiv:2407.08608"
FA2 = "Dao 2023, arXiv:2307.08691"
TRITONBENCH = "pytorch/benchmark#2391"


class Attention(NamedTuple):
    """A kernel: rows and keys of a chain's tile, chains for each multiprocessor, warps that read
    keys from shared memory of their own accord (0: wgmma does)."""

    name: str
    source: str
    machine: Machine
    dim: int
    rows: int
    keys: int
    chains: float
    plain: float
    measured: float
    warps: int = 0

    def tile(self) -> Tile:
        pairs, machine, dim = self.rows * self.keys, self.machine, self.dim
        arithmetic = arithmetic_cycles(machine, pairs * self.plain, pairs)
        if self.warps:
            read = (self.warps * 2 * self.keys + self.rows) * dim * 2
            return Tile(4 * pairs * dim / machine.products, arithmetic, read / machine.shared)
        logits = wgmma_cycles(machine, self.rows, self.keys, dim, True)
        return Tile(logits + wgmma_cycles(machine, self.rows, dim, self.keys, False), arithmetic)

    def teraflops(self) -> float:
        machine = self.machine
        tiles = throughput(self.tile().stations, self.chains) * machine.clock * machine.processors
        return 4e-12 * self.rows * self.keys * self.dim * tiles


def hand_written(
    name: str, source: str, machine: Machine, dim: int, rows: int, keys: int, chains: float,
    measured: float, warps: int = 0,
) -> Attention:  # fmt: skip
    plain = 3.5 + dim / keys
    return Attention(name, source, machine, dim, rows, keys, chains, plain, measured, warps)


# Three or two warpgroups in turns, each with its next logits in flight; or without the latter.
TURNS, ALONE = "FlashAttention-3", "FlashAttention-3, no logits in flight"
ATTENTIONS = (
    hand_written(TURNS, FA3, H100, 64, 64, 128, 4.5, 497),
    hand_written(TURNS, FA3, H100, 128, 64, 176, 3, 648),
    hand_written(TURNS, FA3, H100, 256, 64, 80, 3, 756),
    hand_written(ALONE, FA3, H100, 128, 64, 176, 2, 582),
    Attention("Triton, 4 warps", FA3, H100, 64, 128, 64, 2, 6.9, 403),
    Attention("Triton, 4 warps", FA3, H100, 128, 128, 64, 1, 8.7, 395),
    Attention("Triton, 8 warps", TRITONBENCH, H100, 128, 64, 128, 1.5, 7.3, 477),
    hand_written("FlashAttention-2", FA3, H100_SYNC, 64, 128, 128, 2, 324, warps=4),
    hand_written("FlashAttention-2", FA3, H100_SYNC, 128, 128, 64, 2, 370, warps=4),
    hand_written("FlashAttention-2", FA3, H100_SYNC, 256, 64, 64, 2, 326, warps=4),
    hand_written("FlashAttention-2, A100", FA2, A100, 128, 128, 64, 2, 0.73 * 312, warps=4),
)
HEAD = ("kernel", "source", "D", "published TFLOP/s", "by the model", "ratio")


def rows() -> list[list[str]]:
    return [
        [one.name, one.source, str(one.dim), f"{one.measured:.0f}", f"{one.teraflops():.0f}",
         f"{one.teraflops() / one.measured:.2f}"]
        for one in ATTENTIONS
    ]  # fmt: skip
