"""InfoMin (Tian et al. 2020): the best views share what a task needs, and nothing else.

Factors: digits on photographs at one of 25 places; the two views share some of digit, place and
background, and every factor is a task of its own. Sharing a task's factor alone is the top that is
claimed; sharing all is too much, sharing none of it too little. Augmentation: crops of photographs,
from untouched views to destroyed ones.
"""

from itertools import combinations

import torch
from torch import Generator, Tensor

import contrastive_kernels as ck

from . import train
from .data import FACTORS, Composed, crops, scenes, strength
from .part import TUNING_SEED, Part, Study, Task
from .probe import accuracy, probe
from .verdict import Claim, Condition, mean, minus

BATCH = 128
TEMPERATURE = 0.2
NOISE = 0.03  # so that no pixel is equal in two views
SHARED = [list(x) for n in (1, 2, 3) for x in combinations(FACTORS, n)]

FULL = {
    "strengths": [0.0, 0.25, 0.5, 1.0, 2.0, 4.0],
    "rates": [1e-3, 2e-3, 5e-3],
    "steps": 500,
    "seeds": 5,
    "probe": [3000, 2000],  # labelled scenes to fit on, and to score on
    "batches": 8,  # of held-out pairs, for the bound
}
QUICK = FULL | {
    "strengths": [0.0, 1.0, 4.0], "rates": [5e-3], "steps": 6, "seeds": 2, "probe": [300, 200],
    "batches": 1,
}  # fmt: skip


def tasks(settings: dict) -> list[Task]:
    seeds = range(settings["seeds"])
    return [
        *(
            {"kind": "tuning", "shared": list(FACTORS[:1]), "rate": rate, "seed": TUNING_SEED}
            for rate in settings["rates"]
        ),
        *({"kind": "factors", "shared": s, "seed": seed} for seed in seeds for s in SHARED),
        *({"kind": "factors", "shared": [], "seed": seed} for seed in seeds),
        *(
            {"kind": "strength", "strength": x, "seed": seed}
            for seed in seeds
            for x in settings["strengths"]
        ),
    ]


def choose(settings: dict, study: Study) -> dict:
    return {"rate": study.best("digit", "rate", settings["rates"], kind="tuning")}


def bound(losses: list[Tensor]) -> float:
    """I_NCE in nats, of held-out pairs with BATCH candidates."""
    return ck.mi_lower_bound(torch.stack(losses).mean(), BATCH - 1).item()


def contrast(first: Tensor, second: Tensor) -> Tensor:
    return ck.info_nce(first, second, temperature=TEMPERATURE, symmetric=True)


def measure(task: Task, settings: dict, chosen: dict) -> dict:
    run = strengths if task["kind"] == "strength" else factors
    return run(task, settings, task.get("rate", chosen.get("rate")))


def factors(task: Task, settings: dict, rate: float) -> dict:
    """Trains on scenes that share factors; the accuracy of each factor's probe, and I_NCE.

    Sharing nothing leaves nothing to learn: that encoder is not trained, it has seen the images
    for the statistics of its batch norm.
    """
    seed, shared = task["seed"], task["shared"]
    train_set, test_set = Composed("left"), Composed("right")
    net = train.coarse_network(seed)
    generator = Generator().manual_seed(seed)

    def loss() -> Tensor:
        views = train_set.views(shared, BATCH, NOISE, generator)
        return contrast(*net(torch.cat(views)).chunk(2))

    result: dict = {}
    if shared:
        result["curve"] = train.fit(loss, net, steps=settings["steps"], rate=rate)
        net.eval()
        apart = Generator().manual_seed(1)  # the same held-out pairs for all
        with torch.no_grad():
            losses = [
                contrast(*map(net, test_set.views(shared, BATCH, NOISE, apart)))
                for _ in range(settings["batches"])
            ]
        result["bound"] = bound(losses)
    else:
        with torch.no_grad():
            for _ in range(20):
                net(train_set.images(train_set.draw(BATCH, generator)))
    apart = Generator().manual_seed(2)
    scenes_of = [
        composed.draw(count, apart)
        for composed, count in zip((train_set, test_set), settings["probe"], strict=True)
    ]
    images = train_set.images(scenes_of[0]), test_set.images(scenes_of[1])
    labels = train_set.labels(scenes_of[0]), test_set.labels(scenes_of[1])
    for name in FACTORS:
        result[name] = probe(net[0], images, (labels[0][name], labels[1][name]))
    return result


def strengths(task: Task, settings: dict, rate: float) -> dict:
    """Trains on crops whose views are augmented more or less; accuracy, and I_NCE."""
    seed = task["seed"]
    own = scenes()
    images = own._replace(augmentation=strength(own.augmentation, task["strength"]))
    net = train.network(seed)
    views = train.Views(net, images, Generator().manual_seed(seed))

    def loss(side: str = "left") -> Tensor:
        return contrast(*views(crops(side).draw(BATCH, views.generator)[0], 2))

    curve = train.fit(loss, net, steps=settings["steps"], rate=rate)
    net.eval()
    views.generator = Generator().manual_seed(1)
    with torch.no_grad():
        losses = [loss("right") for _ in range(settings["batches"])]
    net.train()
    return {"curve": curve, "bound": bound(losses), **accuracy(net[0])}


def seconds(task: Task, settings: dict) -> float:
    """As measured, on one thread."""
    if task["kind"] == "strength":
        return settings["steps"] * 0.048 + 3
    return settings["steps"] * 0.045 * bool(task["shared"]) + 2


def claims(study: Study, settings: dict) -> list[Claim]:
    def task_scores(task: str, shared: list[str]) -> dict[int, float]:
        return study.series(task, kind="factors", shared=shared)

    def conditions(task: str) -> list[Condition]:
        top = task_scores(task, [task])
        more = [s for s in SHARED if task in s and len(s) > 1]
        less = [s for s in SHARED if task not in s]
        return [
            Condition(
                f"{task}: shared alone, less with others too",
                minus(top, mean(*(task_scores(task, s) for s in more))),
            ),
            Condition(
                f"{task}: shared alone, less not shared",
                minus(top, mean(*(task_scores(task, s) for s in less))),
            ),
        ]

    xs = settings["strengths"]

    def of_strength(x: float) -> dict[int, float]:
        where = {"kind": "strength", "strength": x}
        return mean(*(study.series(field, **where) for field in ("neighbours", "probe")))

    top = 1.0  # as the demo augments: not picked by what came out
    return [
        *(
            Claim(
                f"Task “{name}”: the best views share it and nothing else",
                "shared background leaves digits out (sec. 4)",
                conditions(name),
            )
            for name in FACTORS
        ),
        Claim(
            "Augmentation: an inverted U from none to destructive",
            "jitter and crops have a sweet spot in between (ImageNet)",
            [
                Condition(f"strength {top:g} less {xs[0]:g}",
                          minus(of_strength(top), of_strength(xs[0]))),
                Condition(f"strength {top:g} less {xs[-1]:g}",
                          minus(of_strength(top), of_strength(xs[-1]))),
            ],
        ),
    ]  # fmt: skip


PART = Part(
    "What views should share: InfoMin",
    FULL, QUICK, tasks, choose, measure, seconds, claims, "--part infomin",
)  # fmt: skip
