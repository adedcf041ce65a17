"""The time of a sweep by counting: a closed network of queues on each multiprocessor.

A chain of work, that of one program or warpgroup, alternates between products on tensor cores and
other arithmetic, and waits where another chain is at work: mean value analysis (Reiser and
Lavenberg 1980) gives how many tiles come out. L2 and device memory deliver ahead of need: they only
bound. Programs come in waves, and in the last one a multiprocessor holds fewer chains.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Machine(NamedTuple):
    """Rates of one multiprocessor for a clock, `clock` of them a second while it multiplies.

    `products`: floating point operations of tensor cores; `lanes` of ordinary instructions,
    `special` of exponentials; `shared` bytes. `l2` and `memory` are of the device, in bytes/s.
    """

    processors: int
    clock: float
    products: float
    lanes: int
    special: int
    shared: int
    l2: float
    memory: float


# 790 TFLOP/s of dense bfloat16 products and 4.3 TB/s were measured on an H200: a limit of power,
# taken as the clock. Products by mma.sync are slower and leave the clock alone: 62 % of wgmma's
# peak (Luo et al. 2024, arXiv:2402.13499). Nobody has measured the rate of L2 here.
H200 = Machine(132, 790e12 / (132 * 4096), 4096, 128, 16, 128, 5.5e12, 4.3e12)
H100 = H200._replace(memory=2.6e12)
H100_SYNC = H100._replace(clock=1.755e9, products=0.62 * 4096)
A100 = Machine(108, 1.41e9, 2048, 64, 16, 128, 4.5e12, 1.7e12)


class Tile(NamedTuple):
    """What one tile of a chain takes: cycles of products, of other arithmetic and, where operands
    come through registers, of shared memory; bytes from L2."""

    products: float
    arithmetic: float
    shared: float = 0.0
    bytes: float = 0.0

    @property
    def stations(self) -> tuple[float, ...]:
        return self.products, self.arithmetic, self.shared


class Sweep(NamedTuple):
    """Programs of so many tiles each; a multiprocessor holds `resident` programs of `chains`.

    `stored` bytes go to device memory. A chain whose next logits are in flight with its present
    arithmetic counts as one and a half; so do two warpgroups that meet at a barrier for each tile.
    """

    tile: Tile
    programs: int
    tiles: float
    resident: int = 1
    chains: float = 1.0
    stored: float = 0.0


class Prediction(NamedTuple):
    milliseconds: float
    limit: str


def throughput(stations: tuple[float, ...], chains: float) -> float:
    """Tiles for a cycle of a network with so many chains; linear between whole numbers."""
    queues, rates = [0.0] * len(stations), [0.0]
    for count in range(1, math.ceil(chains) + 1):
        times = [work * (1 + queue) for work, queue in zip(stations, queues, strict=True)]
        rates.append(count / sum(times))
        queues = [rates[-1] * time for time in times]
    below = math.floor(chains)
    return rates[below] + (chains - below) * (rates[math.ceil(chains)] - rates[below])


def wgmma_cycles(machine: Machine, m: int, n: int, k: int, from_shared: bool) -> float:
    """As long as tensor cores take, or shared memory to deliver both operands or one."""
    delivered = (64 * from_shared + n) * 2 * k * (m / 64)
    return max(2 * m * n * k / machine.products, delivered / machine.shared)


def arithmetic_cycles(machine: Machine, plain: float, special: float) -> float:
    """Exponentials wait for what makes their argument, and are waited for: their times add."""
    return plain / machine.lanes + special / machine.special


def predicted(machine: Machine, sweep: Sweep) -> Prediction:
    """Wave by wave: a program takes as long as the chains beside it make it."""
    tile, slots = sweep.tile, sweep.resident * machine.processors
    delivered = machine.l2 / machine.processors / machine.clock
    cycles = 0.0
    left = sweep.programs
    while left > 0:
        here = min(sweep.resident, math.ceil(left / machine.processors))
        chains = here * sweep.chains
        rate = throughput(tile.stations, chains)
        if tile.bytes:
            rate = min(rate, delivered / tile.bytes)
        waves = max(1, left // slots) if here == sweep.resident else 1
        cycles += waves * here * sweep.tiles / rate
        left -= waves * here * machine.processors
    seconds = cycles / machine.clock
    seconds = max(seconds, sweep.stored / machine.memory)
    return Prediction(1e3 * seconds, limit(machine, sweep))


def limit(machine: Machine, sweep: Sweep) -> str:
    """What a full multiprocessor waits for: the busiest unit, and how busy it is."""
    tile = sweep.tile
    rate = throughput(tile.stations, sweep.resident * sweep.chains)
    l2 = tile.bytes / (machine.l2 / machine.processors / machine.clock)
    rate = min(rate, 1 / l2) if l2 else rate
    names = ("products", "arithmetic", "shared memory", "L2")
    busy = {name: work * rate for name, work in zip(names, (*tile.stations, l2), strict=True)}
    name = max(busy, key=lambda unit: busy[unit])
    return f"{name} {100 * busy[name]:.0f} %"
