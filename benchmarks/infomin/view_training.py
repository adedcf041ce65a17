"""Encoders of two views, their training with InfoNCE, and what is measured of them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Generator, Tensor, nn

import contrastive_kernels as ck

from .colour_flow import ColourFlow, flip_sign, views

FEATURES, EMBEDDING = 64, 64
BATCH = 128  # pairs of a step, and candidates of the bound
TEMPERATURE = 0.1
RATE, FLOW_RATE = 3e-3, 1e-2  # peaks of the learning rates

# split ("train" or "test"), number of pairs, generator -> the two views of each pair
Draw = Callable[[str, int, Generator], tuple[Tensor, Tensor]]


class Encoders(NamedTuple):
    """The encoder of each view; one network twice where both views are of one kind."""

    first: nn.Sequential
    second: nn.Sequential

    def parameters(self) -> list[nn.Parameter]:
        return list(nn.ModuleList(self).parameters())

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        """InfoNCE of both directions; the negatives are the other pairs of the batch."""
        return ck.info_nce(
            self.first(first), self.second(second), temperature=TEMPERATURE, symmetric=True
        )


class Labelled(NamedTuple):
    """The views of labelled patches to fit a probe on and to score it on.

    `tasks`: name -> labels of both; a patch with the label -1 has no part in the task.
    """

    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    tasks: dict[str, tuple[np.ndarray, np.ndarray]]


def encoder(channels: int) -> nn.Sequential:
    """A trunk of three convolutions and a mean over the pixels, and a head for the loss."""
    head = nn.Sequential(
        nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU(),
        nn.Linear(FEATURES, EMBEDDING),
    )  # fmt: skip
    return nn.Sequential(_trunk(channels), head)


def contrast(draw: Draw, encoders: Encoders, *, steps: int, seed: int) -> None:
    """Trains the encoders on random pairs of the training bands."""
    generator = Generator().manual_seed(seed)
    _minimise(
        lambda: encoders.loss(*draw("train", BATCH, generator)),
        [(encoders.parameters(), RATE)],
        steps,
    )


def settle(draw: Draw, encoders: Encoders, *, steps: int, seed: int) -> None:
    """Gives untrained encoders the batch norm statistics of the training bands."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(steps):
            encoders.loss(*draw("train", BATCH, generator))


def view_loss(
    flow: ColourFlow,
    encoders: Encoders,
    pixels: Tensor,
    classifiers: nn.ModuleList | None = None,
    labelled: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What one step of the view generator minimises (Tian et al. 2020, sec. 4.2).

    Its gradient trains the encoders f to raise I_NCE and the flow g to lower it:

        min_g max_f I_NCE(f1(g(x)_1), f2(g(x)_2:3)),

    and with `classifiers` c and `labelled` (pixels, labels), semi-supervised,

        min_{g,c1,c2} max_f I_NCE + CE(c1(g(x)_1), y) + CE(c2(g(x)_2:3), y).
    """
    loss = encoders.loss(*map(flip_sign, views(flow(pixels)[0])))
    if classifiers is None:
        return loss
    both = views(flow(labelled[0])[0])
    logits = (classifier(view) for classifier, view in zip(classifiers, both, strict=True))
    return loss + sum(F.cross_entropy(each, labelled[1]) for each in logits)


def learn_views(
    draw: Callable[[Generator], Tensor],
    *,
    volume_preserving: bool,
    draw_labelled: Callable[[Generator], tuple[Tensor, Tensor]] | None,
    classes: int,
    steps: int,
    seed: int,
) -> ColourFlow:
    """A colour model trained by `view_loss`, frozen.

    `draw` gives random pixels (N, 3, H, W); `draw_labelled`, semi-supervised, also labels (N,).
    """
    torch.manual_seed(seed)
    generator = Generator().manual_seed(seed)
    flow = ColourFlow(volume_preserving=volume_preserving)
    encoders = Encoders(encoder(1), encoder(2))
    classifiers = nn.ModuleList(
        nn.Sequential(_trunk(channels), nn.Linear(FEATURES, classes)) for channels in (1, 2)
    )

    def loss() -> Tensor:
        if draw_labelled is None:
            return view_loss(flow, encoders, draw(generator))
        return view_loss(flow, encoders, draw(generator), classifiers, draw_labelled(generator))

    learners = encoders.parameters() + list(classifiers.parameters())
    _minimise(loss, [(learners, RATE), (list(flow.parameters()), FLOW_RATE)], steps)
    return flow.requires_grad_(False)


@torch.no_grad()
def bound(draw: Draw, encoders: Encoders, *, batches: int, seed: int) -> float:
    """I_NCE in nats: log 128 less the loss of held-out pairs, 128 candidates each."""
    nn.ModuleList(encoders).eval()
    generator = Generator().manual_seed(seed)
    losses = [encoders.loss(*draw("test", BATCH, generator)) for _ in range(batches)]
    return ck.mi_lower_bound(torch.stack(losses).mean(), BATCH - 1).item()


def accuracies(encoders: Encoders, labelled: Labelled) -> dict[str, float]:
    """The accuracy of a linear probe for each task, on the features of all views side by side."""
    train, test = (features(encoders, each) for each in (labelled.train, labelled.test))
    return {name: probe(train, test, *labels) for name, labels in labelled.tasks.items()}


@torch.no_grad()
def features(encoders: Encoders, given: tuple[Tensor, ...]) -> np.ndarray:
    """The frozen features (N, F) of the trunks; of one view alone with the first encoder."""
    nn.ModuleList(encoders).eval()
    parts = [network[0](view) for network, view in zip(encoders, given, strict=False)]
    return torch.cat(parts, 1).numpy()


def probe(
    train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray
) -> float:
    """The accuracy of logistic regression, fit on train, scored on test; the label -1 is no class.

    Features and labels: (N, F) and (N,).
    """
    fit, score = train_labels >= 0, test_labels >= 0
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return model.fit(train[fit], train_labels[fit]).score(test[score], test_labels[score])


def _trunk(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in [(channels, 16), (16, 32), (32, FEATURES)]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return trunk.to(memory_format=torch.channels_last)  # a third faster on a CPU


def _minimise(
    loss: Callable[[], Tensor], groups: Iterable[tuple[list[nn.Parameter], float]], steps: int
) -> None:
    """`steps` steps of AdamW over (parameters, peak of the learning rate), in one cycle."""
    groups = [{"params": parameters, "lr": rate} for parameters, rate in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps, cycle_momentum=False
    )
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
