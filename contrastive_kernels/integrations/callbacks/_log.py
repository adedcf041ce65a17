"""What a callback of any trainer does: patch, look on in steps that are logged, report."""

from __future__ import annotations

from contextlib import ExitStack

from ...losses.observe import Observation, observed
from ..swap import SwapStatus, patch, patch_status


class LossLog:
    """Patches the losses of packages, and keeps what losses say of themselves.

    Patches stay after the training, as those of `patch` do. They are set here, at once: a Trainer
    keeps the forward that a model has when it is prepared.
    """

    def __init__(self, *peers: str) -> None:
        for peer in peers:
            patch(peer)
        self._looking = ExitStack()
        self._calls: list[Observation] = []
        self.start()

    def start(self) -> None:
        """Forget what was before this training."""
        self.close()
        self._calls = []
        self._before = patch_status()

    def look(self) -> None:
        """Look on until `close`."""
        self.close()
        self._calls = self._looking.enter_context(observed())

    def close(self) -> None:
        self._looking.close()

    def take(self) -> dict[str, float]:
        """What there is to log since `look`, by loss and number, each the mean over the calls."""
        self.close()
        calls, self._calls = self._calls, []
        found: dict[str, list[float]] = {}
        for call in calls:
            for name, number in call.numbers().items():
                found.setdefault(f"{call.name}/{name}", []).append(number)
        return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}

    def report(self) -> str:
        """`patch_status` of this training, a line for each loss that was called."""
        self.close()
        lines = [
            f"contrastive_kernels: {peer}'s {label} ran {how}"
            for peer, swaps in patch_status().items()
            for label, status in swaps.items()
            for how in _how(status, self._before.get(peer, {}).get(label))
        ]
        return "\n".join(lines) or "contrastive_kernels: no loss of a patched class was called"


def _how(status: SwapStatus, before: SwapStatus | None) -> list[str]:
    """How the calls since then ran."""
    fused = status.fused - (before.fused if before else 0)
    earlier = before.fallback if before else {}
    unfused = {r: count - earlier.get(r, 0) for r, count in status.fallback.items()}
    said = [f"fused in {fused} calls"] if fused else []
    return said + [f"unfused in {count} calls: {r}" for r, count in unfused.items() if count]
