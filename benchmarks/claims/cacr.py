"""CACR and CCT (Zheng et al. 2021, 2023): ahead of contrastive losses, further where images are
uncurated, and less sensitive to the number of negatives and to how they are chosen.

Few crops, the same number balanced and with a long tail of ratio 100, are all that is trained on;
the test is on all photographs alike. Every loss has its hardness tuned, among the values of the
papers, on balanced crops with one positive and a seed apart.
"""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Generator, Tensor

import contrastive_kernels as ck

from . import train
from .data import few, scenes
from .part import TUNING_SEED, Part, Study, Task
from .probe import accuracy
from .verdict import Claim, Condition, mean, minus

HARDNESS = {  # temperatures, and t- of CACR
    "InfoNCE": (0.1, 0.2, 0.5),
    "debiased": (0.1, 0.2, 0.5),
    "HCL": (0.1, 0.2, 0.5),
    "CACR": (0.3, 0.9, 2.0),
}
RIVALS = ("InfoNCE", "debiased", "HCL")
BATCH = 64
FULL = {
    "losses": list(HARDNESS),
    "positives": [1, 4],
    "ratios": [1, 100],
    "total": 1100,
    "negatives": [4, 16, 64],
    "steps": 500,
    "seeds": 5,
    "rate": 5e-3,
    "weights": 200,  # images whose weights are shown
}
QUICK = FULL | {
    "losses": ["InfoNCE", "CACR"], "negatives": [4, 16], "steps": 6, "seeds": 2, "weights": 40,
}  # fmt: skip


def tasks(settings: dict) -> list[Task]:
    seeds = range(settings["seeds"])
    return [
        *(
            {"kind": "tuning", "loss": loss, "positives": 1, "ratio": 1, "hardness": hardness,
             "seed": seed}
            for loss in settings["losses"]
            for hardness in HARDNESS[loss]
            for seed in (TUNING_SEED, TUNING_SEED + 1)
        ),
        *(
            {"kind": "training", "loss": loss, "positives": k, "ratio": ratio, "seed": seed}
            for seed in seeds
            for ratio in settings["ratios"]
            for k in settings["positives"]
            for loss in settings["losses"]
        ),
        *(
            {"kind": "negatives", "loss": loss, "choice": choice, "negatives": count, "seed": seed}
            for seed in seeds
            for count, choice in choices(settings)
            for loss in ("InfoNCE", "CACR")
        ),
        {"kind": "weights", "seed": 0},
    ]  # fmt: skip


def choices(settings: dict) -> list[tuple[int, str]]:
    """Numbers of negatives drawn from all crops, and the second also all from one photograph."""
    counts = settings["negatives"]
    return [(count, "all") for count in counts] + [(counts[1], "one photograph")]


def choose(settings: dict, study: Study) -> dict:
    """The hardness of each loss."""
    return {
        loss: study.best("neighbours", "hardness", list(HARDNESS[loss]), kind="tuning", loss=loss)
        for loss in settings["losses"]
    }


def of_pair(name: str, hardness: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of two views that has no form for several: all pairs of views are averaged."""
    match name:
        case "InfoNCE":
            return lambda a, b: ck.info_nce(a, b, temperature=hardness, symmetric=True)
        case "debiased":
            return lambda a, b: ck.debiased(a, b, temperature=hardness, tau_plus=0.1)
        case "HCL":
            return lambda a, b: ck.hcl(a, b, temperature=hardness, tau_plus=0.1, beta=1.0)
    raise ValueError(f"name must be one of {', '.join(RIVALS)}, got {name}")


def of_views(name: str, views: Tensor, hardness: float) -> Tensor:
    """A loss of views (V, N, D): every one is a query, the V - 1 others its positives."""
    if name == "CACR":
        return ck.cacr_views(views, t_pos=1.0, t_neg=hardness)
    loss = of_pair(name, hardness)
    pairs = [loss(views[u], views[v]) for u, v in combinations(range(len(views)), 2)]
    return torch.stack(pairs).mean()


def of_given(name: str, query: Tensor, key: Tensor, negatives: Tensor, hardness: float) -> Tensor:
    """A loss of one positive and given negatives (M, D)."""
    if name == "CACR":
        return ck.cacr(query, key[:, None], negatives=negatives, t_pos=1.0, t_neg=hardness)
    return ck.info_nce(query, key, negatives=negatives, temperature=hardness)


def measure(task: Task, settings: dict, chosen: dict) -> dict:
    seed = task["seed"]
    generator = Generator().manual_seed(seed)
    images, labels = few(settings["total"], task.get("ratio", 1), seed)
    net = train.network(seed)
    views = train.Views(net, scenes(), generator)
    name = task.get("loss", "CACR")
    hardness = task.get("hardness", chosen.get(name))

    def batch(count: int = BATCH, of: Tensor | None = None) -> Tensor:
        """Different images, of these indices."""
        of = torch.arange(len(images)) if of is None else of
        return images[of[torch.randperm(len(of), generator=generator)[:count]]]

    def loss() -> Tensor:
        if task["kind"] != "negatives":
            return of_views(name, views(batch(), 1 + task.get("positives", 4)), hardness)
        count = task["negatives"]
        rest = None
        if task["choice"] != "all":
            photograph = torch.randint(labels.max() + 1, (1,), generator=generator)
            rest = (labels == photograph).nonzero()[:, 0]
        both = views(torch.cat([batch(), batch(count, rest)]), 2)
        return of_given(name, both[0, :BATCH], both[1, :BATCH], both[1, BATCH:], hardness)

    curve = train.fit(loss, net, steps=settings["steps"], rate=settings["rate"])
    if task["kind"] == "weights":
        with torch.no_grad():
            net.eval()
            chosen_views = views(images[: settings["weights"]], 5)
        return {"weights": weights(chosen_views, labels[: settings["weights"]], hardness)}
    return {"curve": curve, **accuracy(net[0])}


def weights(views: Tensor, labels: Tensor, t_neg: float) -> dict[str, list]:
    """How much CACR weighs pairs of the first view with others, over their squared distance.

    Weights are in multiples of equal ones. Of the negatives of the first images, also whether they
    are of the same photograph.
    """
    unit = torch.nn.functional.normalize(views, dim=2)
    query, positives = unit[0], unit[1:].transpose(0, 1)
    near = (query[:, None] - positives).square().sum(2)
    pull = near.softmax(1) * near.shape[1]
    far = torch.cdist(query, unit[1]).square()
    far.fill_diagonal_(float("inf"))
    push = (-t_neg * far).softmax(1) * (len(far) - 1)
    shown = slice(0, 4)
    others = ~torch.eye(len(far), dtype=torch.bool)[shown]
    same = (labels[shown, None] == labels)[others]

    def rounded(x: Tensor) -> list[float]:
        return [round(value, 3) for value in x.flatten().tolist()]

    return {
        "positive_distance": rounded(near[:50]),
        "positive_weight": rounded(pull[:50]),
        "negative_distance": rounded(far[shown][others]),
        "negative_weight": rounded(push[shown][others]),
        "negative_same": same.int().tolist(),
    }


def seconds(task: Task, settings: dict) -> float:
    """As measured, on one thread: in proportion to the views of a step."""
    count = BATCH * (1 + task.get("positives", 4 if task["kind"] == "weights" else 1))
    if task["kind"] == "negatives":
        count = 2 * (BATCH + task["negatives"])
    return settings["steps"] * count * 1.8e-4 + 3


def claims(study: Study, settings: dict) -> list[Claim]:
    def scores(loss: str, k: int, ratio: int) -> dict[int, float]:
        where = {"kind": "training", "loss": loss, "positives": k, "ratio": ratio}
        return mean(*(study.series(field, **where) for field in ("neighbours", "probe")))

    def given(loss: str, count: int, choice: str = "all") -> dict[int, float]:
        where = {"kind": "negatives", "loss": loss, "negatives": count, "choice": choice}
        return mean(*(study.series(field, **where) for field in ("neighbours", "probe")))

    rivals = [loss for loss in RIVALS if loss in settings["losses"]]
    even, tail = settings["ratios"][0], settings["ratios"][-1]
    least, middle, most = (settings["negatives"][i] for i in (0, 1, -1))

    def ahead(k: int, ratio: int) -> list[Condition]:
        """Of every other loss: the best of them is not picked by its result."""
        return [
            Condition(f"K = {k}, less {loss}",
                      minus(scores("CACR", k, ratio), scores(loss, k, ratio)))
            for loss in rivals
        ]  # fmt: skip

    def gap(k: int, loss: str) -> dict[int, float]:
        tails, evens = (minus(scores("CACR", k, r), scores(loss, k, r)) for r in (tail, even))
        return minus(tails, evens)

    def loses(loss: str, count: int, choice: str) -> dict[int, float]:
        return minus(given(loss, most if choice == "all" else count), given(loss, count, choice))

    return [
        Claim(
            "CACR is ahead of InfoNCE, debiased and HCL on balanced images",
            "“consistently outperforms” (abstract); tables not at hand",
            [c for k in settings["positives"] for c in ahead(k, even)],
        ),
        Claim(
            f"CACR is ahead on images with a long tail (ratio {tail})",
            "“better robustness” on imbalanced data (abstract)",
            [c for k in settings["positives"] for c in ahead(k, tail)],
        ),
        Claim(
            "CACR's lead is larger with a long tail than without",
            "the same",
            [
                Condition(f"K = {k}, against {loss}", gap(k, loss))
                for k in settings["positives"]
                for loss in rivals
            ],
        ),
        Claim(
            "Four positives are better than one for CACR",
            "its default; figures not at hand",
            [
                Condition(f"ratio {r}", minus(scores("CACR", 4, r), scores("CACR", 1, r)))
                for r in settings["ratios"]
            ],
        ),
        Claim(
            "(a reason, looked for afterwards) What gains is four positives, with any loss",
            "CACR with four beside the others with one",
            [
                Condition(
                    "CACR with four, less InfoNCE with one",
                    minus(scores("CACR", 4, even), scores("InfoNCE", 1, even)),
                ),
                *(
                    Condition(
                        f"{loss}, four less one",
                        minus(scores(loss, 4, even), scores(loss, 1, even)),
                    )
                    for loss in rivals
                ),
            ],
        ),
        Claim(
            "CCT (one positive) depends less than InfoNCE on the number and choice of negatives",
            "contrastive losses are “sensitive to how many negatives” (abstract of CCT)",
            [
                Condition(
                    f"loses less from {most} to {least} negatives",
                    minus(loses("InfoNCE", least, "all"), loses("CACR", least, "all")),
                ),
                Condition(
                    f"loses less where {middle} negatives are of one photograph",
                    minus(
                        loses("InfoNCE", middle, "one photograph"),
                        loses("CACR", middle, "one photograph"),
                    ),
                ),
            ],
        ),
    ]


PART = Part(
    "Far positives and near negatives: CACR and CCT",
    FULL, QUICK, tasks, choose, measure, seconds, claims, "--part cacr",
)  # fmt: skip
