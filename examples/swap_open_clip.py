"""open_clip's own training loop on crops of photographs and their captions, as it is and fused.

    pip install open_clip_torch scikit-image tqdm
    python examples/swap_open_clip.py [steps]

`ck.patched("open_clip")` is the whole swap; with `ck.patch("open_clip")` at the top of a training
script, open_clip's `create_loss` makes losses that run fused.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import open_clip
import torch
from beside import beside
from open_clip_train.train import train_one_epoch
from skimage import data
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

PHOTOGRAPHS = ("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel")
SIDE, BATCH, CONTEXT = 32, 1024, 16
ARGUMENTS = SimpleNamespace(
    device="cpu", precision="fp32", distill=False, siglip=False, model="tiny", horovod=False,
    accum_freq=1, skip_scheduler=True, grad_clip_norm=1.0, log_every_n_steps=1, wandb=False,
    local_loss=False, gather_with_grad=False, rank=0, world_size=1, distributed=False,
    batch_size=BATCH,
)  # fmt: skip


def crops() -> tuple[Tensor, list[str]]:
    """Grey crops (N, 3, 32, 32) of the photographs, each with a caption of its own."""
    images, captions = [], []
    for name in PHOTOGRAPHS:
        photo = torch.tensor(getattr(data, name)()).float() / 255
        photo = photo.mean(-1) if photo.dim() == 3 else photo
        grid = photo.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE)
        for row in range(grid.shape[0]):
            for column in range(grid.shape[1]):
                images.append(grid[row, column])
                captions.append(f"a photo of {name}, row {row}, column {column}")
    return torch.stack(images)[:, None].expand(-1, 3, -1, -1), captions


class Losses:
    """Hands the losses that open_clip writes to its TensorBoard on to `on_step`."""

    def __init__(self, on_step: Callable[[float], None]) -> None:
        self.on_step = on_step

    def add_scalar(self, name: str, value: float, _step: int) -> None:
        if name == "train/loss":
            self.on_step(value)


def main(steps: int = 12) -> float:
    images, captions = crops()
    tokens = open_clip.get_tokenizer("RN50", context_length=CONTEXT)(captions)

    def train(on_step: Callable[[float], None]) -> None:
        model = open_clip.CLIP(
            embed_dim=128,
            vision_cfg={"image_size": SIDE, "patch_size": 8, "layers": 2, "width": 64},
            text_cfg={"context_length": CONTEXT, "width": 64, "heads": 2, "layers": 2},
            output_dict=True,
        )
        order = torch.randint(len(images), (steps * BATCH,))
        loader = DataLoader(TensorDataset(images[order], tokens[order]), BATCH)
        loader.num_batches, loader.num_samples = steps, steps * BATCH
        source = SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)
        train_one_epoch(
            model, {"train": source}, open_clip.create_loss(ARGUMENTS), epoch=0,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), scaler=None, scheduler=None,
            dist_model=None, args=ARGUMENTS, tb_writer=Losses(on_step),
        )  # fmt: skip

    return beside("open_clip", train, steps)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
