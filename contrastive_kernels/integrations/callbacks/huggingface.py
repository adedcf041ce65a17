"""A callback of transformers' Trainer, and of those derived from it, as sentence-transformers'."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ._log import LossLog


class FusedLosses(TrainerCallback):
    """Patches losses, logs what they say of themselves, and prints at the end how calls ran.

        trainer = Trainer(...)
        FusedLosses("sentence_transformers").add_to(trainer)

    In steps that are logged (with the strategy "epoch": in the first of an epoch) every loss of
    this package adds, as "mnrl/accuracy": accuracy, positive_similarity, negative_similarity,
    mi_lower_bound, where it has them; forward_ms, backward_ms and memory_mb.

    `add_to` puts it before the callbacks that report to TensorBoard, W&B and others. Given to the
    Trainer as one of its `callbacks` it comes after them, and only the Trainer's own history and
    the progress bar see the numbers.

    Args:
        peers: packages to patch; for some of their classes alone, or with options, call `patch`
            and leave them out here. Make it before the Trainer where that prepares models at once.
    """

    def __init__(self, *peers: str) -> None:
        self.losses = LossLog(*peers)
        self.numbers: dict[str, float] = {}
        self.epoch_begins = False

    def add_to(self, trainer: Any) -> None:
        """Make it the first callback of a Trainer."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.losses.start()
        self.numbers = {}

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.epoch_begins = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_logged(args, state, state.global_step + 1):
            self.losses.look()
        self.epoch_begins = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.numbers = self.losses.take() or self.numbers

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["logs"].update(self.numbers)
        state.log_history[-1].update(self.numbers)
        self.numbers = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            print(self.losses.report())

    def _is_logged(self, args: TrainingArguments, state: TrainerState, step: int) -> bool:
        if args.logging_first_step and step == 1:
            return True
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return self.epoch_begins
        every_so_often = args.logging_strategy == IntervalStrategy.STEPS
        return every_so_often and step % state.logging_steps == 0
