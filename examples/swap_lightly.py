"""SimCLR with Lightning and lightly's NTXentLoss on scikit-learn's digits, as it is and fused.

    pip install lightly pytorch-lightning scikit-learn tqdm
    python examples/swap_lightly.py [steps]

`ck.patched("lightly")` is the whole swap; in a trainer of your own the line is
`from contrastive_kernels.integrations.lightly import NTXentLoss`.
"""

import logging
import sys
import warnings
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from beside import beside
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 1024


class SimCLR(pl.LightningModule):
    def __init__(self, on_step: Callable[[float], None]) -> None:
        super().__init__()
        self.on_step = on_step
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = SimCLRProjectionHead(128, 128, 128)
        self.criterion = NTXentLoss(temperature=0.2)

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        views = [self.head(self.encoder(augment(batch[0]))) for _ in range(2)]
        loss = self.criterion(*views)
        self.on_step(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def augment(images: Tensor) -> Tensor:
    """Each image shifted by up to a pixel, brighter or darker, with noise."""
    dx, dy = torch.randint(-1, 2, (2,)).tolist()
    gain = torch.empty(len(images), 1, 1, 1).uniform_(0.6, 1.4)
    return images.roll((dx, dy), (2, 3)) * gain + 0.1 * torch.randn_like(images)


def main(steps: int = 30) -> float:
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16

    def train(on_step: Callable[[float], None]) -> None:
        loader = DataLoader(TensorDataset(images), BATCH, shuffle=True, drop_last=True)
        trainer = pl.Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, barebones=True
        )
        trainer.fit(SimCLR(on_step), loader)

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    return beside("lightly", train, steps)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
