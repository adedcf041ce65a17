"""A callback of Lightning's Trainer, of `lightning.pytorch` or of `pytorch_lightning`."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ._log import LossLog

# The same package under two names; a Trainer takes callbacks of its own.
_NAMES = ("lightning.pytorch", "pytorch_lightning")
_NAME = next((name for name in _NAMES if name in sys.modules), _NAMES[1])

Callback: Any = object if TYPE_CHECKING else importlib.import_module(_NAME).Callback


class FusedLosses(Callback):
    """Patches losses, logs what they say of themselves, and prints at the end how calls ran.

        trainer = Trainer(callbacks=[FusedLosses("lightly")])

    In steps that are logged (`log_every_n_steps`) every loss of this package adds, as
    "nt_xent/accuracy": accuracy, positive_similarity, negative_similarity, mi_lower_bound, where it
    has them; forward_ms, backward_ms and memory_mb.

    Import it after Lightning, whose name may be `lightning` or `pytorch_lightning`.

    Args:
        peers: packages to patch; for some of their classes alone, or with options, call `patch`
            and leave them out here.
    """

    def __init__(self, *peers: str) -> None:
        self.losses = LossLog(*peers)

    def on_train_start(self, _trainer: Any, _module: Any) -> None:
        self.losses.start()

    def on_train_batch_start(self, trainer: Any, *_arguments: Any) -> None:
        # what Lightning's own monitors ask
        if trainer._logger_connector.should_update_logs:
            self.losses.look()

    def on_train_batch_end(self, _trainer: Any, module: Any, *_arguments: Any) -> None:
        numbers = self.losses.take()
        if numbers:
            module.log_dict(numbers, on_step=True, on_epoch=False)

    def on_exception(self, *_arguments: Any) -> None:
        self.losses.close()

    def on_train_end(self, trainer: Any, _module: Any) -> None:
        trainer.print(self.losses.report())
