"""W-MSE (Ermolov et al. 2021): whitening keeps features from collapsing, four positives are better
than two, and no large batch of negatives is needed.

All trainings see equally many views, so that four positives have half the images of two, and a
large batch has fewer steps. The alternatives: the same distance without whitening, where the
gradient stops at one view, and InfoNCE over all pairs of views.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import contrastive_kernels as ck

from . import train
from .data import crops, scenes
from .part import TUNING_SEED, Part, Study, Task
from .probe import accuracy, effective_rank, spectrum
from .verdict import MARGIN, Claim, Condition, mean, minus

TEMPERATURE = 0.2
EPS = 1e-4  # of the steps that have no inverse without
LOSSES = ("W-MSE", "MSE", "InfoNCE")
FULL = {
    "views": 65536 * 2,  # that a training sees
    "batches": [64, 256, 1024],
    "batch": 256,
    "groups": [64, 128, 256],
    "group": 64,
    "rates": [2e-3, 5e-3, 1e-2, 2e-2],
    "seeds": 5,
    "sample": 1000,  # of test crops, for the spectrum
}
QUICK = FULL | {
    "views": 4096, "batches": [64, 256], "groups": [64, 128], "rates": [5e-3], "seeds": 2,
    "sample": 200,
}  # fmt: skip


def tasks(settings: dict) -> list[Task]:
    seeds, usual = range(settings["seeds"]), settings["batch"]

    def training(loss: str, positives: int, batch: int, group: int, seed: int) -> Task:
        return {
            "kind": "training", "loss": loss, "positives": positives, "batch": batch,
            "group": group if loss == "W-MSE" else 0, "seed": seed,
        }  # fmt: skip

    group = settings["group"]
    return [
        *(
            training(loss, 2, usual, group, TUNING_SEED) | {"kind": "tuning", "rate": rate}
            for loss in LOSSES
            for rate in settings["rates"]
        ),
        *(
            training(loss, positives, 2 * usual // positives, group, seed)
            for seed in seeds
            for loss in LOSSES
            for positives in (2, 4)
        ),
        *(
            training(loss, 2, batch, group, seed)
            for seed in seeds
            for loss in ("W-MSE", "InfoNCE")
            for batch in settings["batches"]
            if batch != usual
        ),
        *(
            training("W-MSE", 2, usual, size, seed)
            for seed in seeds
            for size in settings["groups"]
            if size != group
        ),
    ]


def choose(settings: dict, study: Study) -> dict:
    """The rate of each loss."""
    return {
        loss: study.best("neighbours", "rate", settings["rates"], kind="tuning", loss=loss)
        for loss in LOSSES
    }


def loss_of(name: str, views: Tensor, group: int, generator: Generator) -> Tensor:
    """A loss of views (V, N, D)."""
    if name == "W-MSE":
        # the last images of a batch that is no multiple of the group are left out
        whole = views.shape[1] // group * group
        given = {"group_size": group, "generator": generator}
        try:
            return ck.w_mse(views[:, :whole], **given)
        except ValueError:  # features of a group that are nearly dependent, in float32
            return ck.w_mse(views[:, :whole], eps=EPS, **given)
    pairs = list(combinations(range(len(views)), 2))
    if name == "InfoNCE":
        losses = [
            ck.info_nce(views[u], views[v], temperature=TEMPERATURE, symmetric=True)
            for u, v in pairs
        ]
        return torch.stack(losses).mean()
    unit = F.normalize(views, dim=2)
    still = unit.detach()
    cosines = [(unit[u] * still[v] + still[u] * unit[v]).sum(1).mean() / 2 for u, v in pairs]
    return 2 - 2 * torch.stack(cosines).mean()


def measure(task: Task, settings: dict, chosen: dict) -> dict:
    name, seed, positives = task["loss"], task["seed"], task["positives"]
    net = train.network(seed)
    views = train.Views(net, scenes(), Generator().manual_seed(seed))

    def loss() -> Tensor:
        images = crops("left").draw(task["batch"], views.generator)[0]
        return loss_of(name, views(images, positives), task["group"], views.generator)

    steps = settings["views"] // (task["batch"] * positives)
    rate = task.get("rate", chosen.get(name))
    curve = train.fit(loss, net, steps=steps, rate=rate)
    result = {"curve": curve, **accuracy(net[0])}
    net.eval()
    with torch.no_grad():
        features = net[0](scenes().plain(scenes().test)[: settings["sample"]])
        shares = {"features": spectrum(features), "embeddings": spectrum(net[1](features))}
    for space, share in shares.items():
        result[f"rank_{space}"] = effective_rank(share)
        if seed == 0:  # for the picture
            result[f"spectrum_{space}"] = [float(f"{x:.3g}") for x in share]
    return result


def seconds(task: Task, settings: dict) -> float:
    """As measured, on one thread."""
    return settings["views"] * 1.8e-4 + 3


def claims(study: Study, settings: dict) -> list[Claim]:
    usual, group = settings["batch"], settings["group"]

    def series(field: str, loss: str, **where: int) -> dict[int, float]:
        task = {"positives": 2, "batch": usual, "group": group if loss == "W-MSE" else 0} | where
        return study.series(field, kind="training", loss=loss, **task)

    def scores(loss: str, **where: int) -> dict[int, float]:
        return mean(*(series(field, loss, **where) for field in ("neighbours", "probe")))

    four = {"positives": 4, "batch": usual // 2}
    small, large = settings["batches"][0], settings["batches"][-1]
    # in shares of the DIM dimensions, so that all conditions are of one kind
    rank = {
        loss: {s: x / train.DIM for s, x in series("rank_embeddings", loss).items()}
        for loss in LOSSES
    }
    half = dict.fromkeys(rank["W-MSE"], 0.5)
    return [
        Claim(
            "Whitening keeps embeddings from collapsing, plain MSE collapses",
            "W-MSE “avoids degenerate solutions” (abstract)",
            [
                Condition("W-MSE's effective rank above half of D", minus(rank["W-MSE"], half),
                          unit="% of D"),
                Condition("MSE's below half of D", minus(half, rank["MSE"]), unit="% of D"),
                Condition("accuracy, W-MSE less MSE", minus(scores("W-MSE"), scores("MSE"))),
            ],
        ),
        Claim(
            "Four positives are better than two at equal compute",
            "CIFAR-10 91.99 against 91.55 % (table, as other repositories quote it)",
            [
                Condition("W-MSE, 4 less 2", minus(scores("W-MSE", **four), scores("W-MSE"))),
            ],
        ),
        Claim(
            "W-MSE is as good as a contrastive loss",
            "CIFAR-10: W-MSE 91.55 to 91.99, SimCLR 91.80, BYOL 91.73 % (as above)",
            [
                Condition(f"{p} positives, less InfoNCE",
                          minus(scores("W-MSE", **w), scores("InfoNCE", **w)), -MARGIN)
                for p, w in ((2, {}), (4, four))
            ],
        ),
        Claim(
            "W-MSE needs no large batch",
            "no negatives; batches of 256 and 512",
            [
                Condition(f"batch {small} less {large}",
                          minus(scores("W-MSE", batch=small), scores("W-MSE", batch=large)),
                          -MARGIN),
                Condition(
                    f"loses less than InfoNCE from {large} to {small}",
                    minus(
                        minus(scores("InfoNCE", batch=large), scores("InfoNCE", batch=small)),
                        minus(scores("W-MSE", batch=large), scores("W-MSE", batch=small)),
                    ),
                ),
            ],
        ),
        Claim(
            "Groups of twice the dimensions are enough",
            "group size about 2 D (author, in the repository)",
            [
                Condition(f"group {group} less {size}",
                          minus(scores("W-MSE"), scores("W-MSE", group=size)), -MARGIN)
                for size in settings["groups"]
                if size > group
            ],
        ),
    ]  # fmt: skip


PART = Part(
    "Whitening instead of negatives: W-MSE",
    FULL, QUICK, tasks, choose, measure, seconds, claims, "--part wmse",
)  # fmt: skip
