"""Losses with buffers in a Lightning trainer, whose first call of them is in inference mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import contrastive_kernels as ck

pl = pytest.importorskip("pytorch_lightning")


class Model(pl.LightningModule):
    """NCE against a bank, InfoNCE against a queue: all that has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.nce, self.info_nce = ck.NCE(num_data=24), ck.InfoNCE(temperature=0.2)
        self.bank, self.queue = ck.MemoryBank(24, 4), ck.FeatureQueue(16, 4)

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, ids = batch
        query, key = self.encoder(x), self.encoder(x + 0.1).detach()
        of_bank = self.nce(query, self.bank.lookup(ids), self.bank.features)
        return of_bank + self.info_nce(query, key, negatives=self.queue.negatives)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self.loss(batch)

    def on_train_batch_end(self, _: object, batch: list[torch.Tensor], __: int) -> None:
        features = self.encoder(batch[0])
        self.bank.update(batch[1], features)
        self.queue.enqueue(features)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("validation", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")  # Lightning's hints on workers and logging
def test_validate_fit_and_the_best_checkpoint(tmp_path):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(24, 6), torch.arange(24)), batch_size=8)
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="validation")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[best], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model()
    (first,) = trainer.validate(model, data, verbose=False)
    trainer.fit(model, data, data)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    assert model.queue.filled == 16 and bool(model.nce.log_z.isfinite())
    again = Model.load_from_checkpoint(best.best_model_path)
    (found,) = trainer.validate(again, data, verbose=False)
    assert found["validation"] == pytest.approx(float(best.best_model_score), rel=1e-6)
    assert found["validation"] < first["validation"]
