"""EqCo (Zhu et al. 2020): is the number of negatives irrelevant with a margin of log(alpha / K)?

MoCo with SGD, as in the paper: InfoNCE and EqCo with K negatives drawn from one queue, equally long
in every training, so that K changes neither the batch nor the age of the keys; and SiMo, the
paper's simplified MoCo, whose K negatives are keys of further images of the same step, no queue.
The rate is tuned once, for K = 65,536, where InfoNCE and EqCo are the same loss, and then frozen.
A likely reason for what few negatives lack is the luck of a draw that a whole batch shares: EqCo is
also trained with the fewest negatives drawn for each query apart.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import contrastive_kernels as ck
from contrastive_kernels.demo.train import MOMENTUM

from . import train
from .data import crops, scenes
from .part import TUNING_SEED, Part, Study, Task
from .probe import accuracy, pull
from .verdict import MARGIN, Claim, Condition, mean, minus

TEMPERATURE = 0.2
BATCH = 64
FILL = 2048  # keys of a pass while the queue is filled
QUERIES = 256  # of a measured gradient
LOSSES = ("InfoNCE", "EqCo")
APART = "negatives of each query"  # a kind of training
LEVEL_LENGTH = 0.1  # a gradient is level where its length is within 10 %

FULL = {
    "counts": [4, 16, 64, 256, 1024, 4096, 16384, 65536],
    "simo": [4, 16],
    "rates": [0.01, 0.03, 0.1, 0.3],
    "seeds": 5,
    "steps": 800,
    "queue": 65536,
    "fresh": 256,  # keys that enter the queue each step
    "draws": 32,  # of negatives, for a gradient
    "longer": 5,  # seeds that are also trained twice as long
}
QUICK = FULL | {
    "counts": [4, 2048], "simo": [4], "rates": [0.1], "seeds": 2, "steps": 6, "queue": 2048,
    "draws": 2, "longer": 1,
}  # fmt: skip


def tasks(settings: dict) -> list[Task]:
    most, seeds = settings["counts"][-1], range(settings["seeds"])

    def training(loss: str, count: int, seed: int, steps: int = 1) -> Task:
        return {"kind": "training", "loss": loss, "negatives": count, "seed": seed, "times": steps}

    ends = [("InfoNCE", most), ("InfoNCE", settings["counts"][0])]
    return [
        *(
            training("InfoNCE", most, TUNING_SEED) | {"kind": "tuning", "rate": rate}
            for rate in settings["rates"]
        ),
        # at K = alpha EqCo is InfoNCE
        *(
            training(loss, count, seed)
            for seed in seeds
            for count in settings["counts"]
            for loss in LOSSES
            if (loss, count) != ("EqCo", most)
        ),
        *(training("SiMo", count, seed) for seed in seeds for count in settings["simo"]),
        *({"kind": "gradient", "seed": seed} for seed in seeds),
        *(training(*end, seed, 2) for end in ends for seed in range(settings["longer"])),
        *(training("EqCo", settings["counts"][0], s) | {"kind": APART} for s in seeds),
    ]


def choose(settings: dict, study: Study) -> dict:
    best = study.best("neighbours", "rate", settings["rates"], kind="tuning")
    return {"rate": best}


def loss_of(name: str, query: Tensor, key: Tensor, negatives: Tensor, alpha: float) -> Tensor:
    """A loss (N,) of queries and keys (N, D) and negatives, shared (K, D) or of each (N, K, D)."""
    given = {"negatives": negatives, "temperature": TEMPERATURE, "reduction": "none"}
    if name == "InfoNCE":
        return ck.info_nce(query, key, **given)
    return ck.eqco(query, key, alpha=alpha, **given)


class Run:
    """The networks of one training, its queue, and its draws."""

    def __init__(self, seed: int, queue: int):
        self.net = train.network(seed)
        self.keys_net = train.key_network(self.net)
        self.generator = Generator().manual_seed(seed)
        self.queue = ck.FeatureQueue(queue, train.DIM) if queue else None
        for _ in range(queue // FILL):
            self.queue.enqueue(self.keys(self.draw(FILL)))

    def draw(self, count: int) -> Tensor:
        return crops("left").draw(count, self.generator)[0]

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        return self.keys_net(scenes().view(images, self.generator))

    def negatives(self, count: int, queries: int = 0) -> Tensor:
        """`count` rows of the queue, each at most once; or as many for each of some queries."""
        rows = self.queue.negatives
        if queries:
            return rows[torch.randint(len(rows), (queries, count), generator=self.generator)]
        return rows[torch.randperm(len(rows), generator=self.generator)[:count]]

    def fit(
        self, name: str, count: int, steps: int, rate: float, settings: dict, *, apart: bool = False
    ) -> list[float]:
        """Trains; the curve of the loss. `apart`: every query has negatives of its own."""
        fresh: list[Tensor] = []
        simo = name == "SiMo"

        def loss() -> Tensor:
            images = self.draw(BATCH + count if simo else settings["fresh"])
            keys = self.keys(images)
            query = self.net(scenes().view(images[:BATCH], self.generator))
            drawn = BATCH if apart else 0
            negatives = keys[BATCH:] if simo else self.negatives(count, drawn)
            fresh[:] = [keys]
            alpha = float(settings["counts"][-1])
            return loss_of(name, query, keys[:BATCH], negatives, alpha).mean()

        def after() -> None:
            train.follow(self.keys_net, self.net, MOMENTUM)
            if not simo:
                self.queue.enqueue(fresh[0])

        return train.fit(loss, self.net, steps=steps, rate=rate, sgd=True, after=after)


def measure(task: Task, settings: dict, chosen: dict) -> dict:
    """Accuracy of one training, or the gradients of both losses over K with one encoder."""
    rate = task.get("rate", chosen.get("rate"))
    if task["kind"] == "gradient":
        run = Run(task["seed"], settings["queue"])
        middle = settings["counts"][len(settings["counts"]) // 2]
        run.fit("InfoNCE", middle, settings["steps"], rate, settings)
        return {"pulls": pulls(run, settings)}
    run = Run(task["seed"], 0 if task["loss"] == "SiMo" else settings["queue"])
    steps = task["times"] * settings["steps"]
    apart = task["kind"] == APART
    curve = run.fit(task["loss"], task["negatives"], steps, rate, settings, apart=apart)
    return {"curve": curve, **accuracy(run.net[0])}


def pulls(run: Run, settings: dict) -> list[dict]:
    """The gradient of the loss of a query to the unit query, over random negatives, for every K."""
    images = run.draw(QUERIES)
    keys = run.keys(images)
    with torch.no_grad():
        query = F.normalize(run.net(scenes().view(images, run.generator)), dim=1)
    found = []
    for count in settings["counts"]:
        draws = [run.negatives(count) for _ in range(settings["draws"])]
        for name in LOSSES:

            def loss(query: Tensor, negatives: Tensor, name: str = name) -> Tensor:
                alpha = float(settings["counts"][-1])
                return loss_of(name, query, keys, negatives, alpha)

            found.append({"loss": name, "negatives": count, **pull(loss, query, draws)._asdict()})
    return found


def seconds(task: Task, settings: dict) -> float:
    """As measured, on one thread."""
    count = task.get("negatives", settings["counts"][len(settings["counts"]) // 2])
    if task.get("loss") == "SiMo":
        return settings["steps"] * 0.015 + 3
    queue = settings["queue"] / FILL * 0.1
    return task.get("times", 1) * settings["steps"] * (0.032 + count * 4.5e-7) + queue + 3


def lengths(study: Study, loss: str, settings: dict) -> dict[int, dict[int, float]]:
    """By number of negatives and seed, in multiples of the length with the most."""
    found: dict[int, dict[int, float]] = {}
    for record in study.find(kind="gradient"):
        own = {p["negatives"]: p["length"] for p in record["pulls"] if p["loss"] == loss}
        for count, length in own.items():
            whole = own[settings["counts"][-1]] or 1.0
            found.setdefault(count, {})[record["seed"]] = length / whole
    return found


def claims(study: Study, settings: dict) -> list[Claim]:
    few, most = settings["counts"][0], settings["counts"][-1]

    def scores(loss: str, count: int, times: int = 1, kind: str = "training") -> dict[int, float]:
        """The mean of both accuracies."""
        where = {"loss": loss, "negatives": count, "times": times, "kind": kind}
        return mean(*(study.series(field, **where) for field in ("neighbours", "probe")))

    whole = scores("InfoNCE", most)
    ours = [count for count in settings["counts"] if count < most]
    eqco = lengths(study, "EqCo", settings).get(few, {})
    nce = lengths(study, "InfoNCE", settings).get(few, {})
    one = dict.fromkeys(eqco, 1.0)
    return [
        Claim(
            "InfoNCE loses accuracy with few negatives",
            "its premise; figures by K not at hand",
            [Condition(f"K = {most:,} less {few}", minus(whole, scores("InfoNCE", few)))],
        ),
        Claim(
            "EqCo is as good with few negatives as with many",
            "K = 16 comparable with MoCo v2's 65,536 (abstract)",
            [
                *(
                    Condition(f"K = {k:,} less {most:,}", minus(scores("EqCo", k), whole), -MARGIN)
                    for k in ours[:3]
                ),
                Condition(
                    f"above InfoNCE at K = {few}",
                    minus(scores("EqCo", few), scores("InfoNCE", few)),
                ),
            ],
        ),
        Claim(
            "EqCo keeps the length of the gradient, InfoNCE does not",
            "derived for any K (section 3)",
            [
                Condition(
                    f"EqCo, K = {few}, relative", minus(eqco, one), -LEVEL_LENGTH, LEVEL_LENGTH, "%"
                ),
                Condition(f"InfoNCE shorter at K = {few}", minus(eqco, nce), unit="%"),
            ],
        ),
        Claim(
            "SiMo, without a queue, is as good as MoCo",
            "68.1 % with 256 negatives of the batch, MoCo v2 67.6 % (its repository)",
            [
                Condition(f"K = {k} less MoCo's {most:,}", minus(scores("SiMo", k), whole), -MARGIN)
                for k in settings["simo"]
            ],
        ),
        Claim(
            "(a reason) What few negatives lack is a draw of each query's own, not their number",
            "–",
            [
                Condition(
                    f"EqCo, K = {few}: drawn apart less shared",
                    minus(scores("EqCo", few, kind=APART), scores("EqCo", few)),
                ),
                Condition(
                    f"EqCo, K = {few} drawn apart less {most:,}",
                    minus(scores("EqCo", few, kind=APART), whole),
                    -MARGIN,
                ),
            ],
        ),
        Claim(
            "(a check) The steps are enough: twice as many change no answer",
            "–",
            [
                Condition(
                    f"InfoNCE, K = {most:,} less {few}: the same after twice the steps",
                    minus(
                        minus(scores("InfoNCE", most, 2), scores("InfoNCE", few, 2)),
                        minus(whole, scores("InfoNCE", few)),
                    ),
                    -MARGIN,
                    MARGIN,
                )
            ],
        ),
    ]


PART = Part(
    "How many negatives: EqCo", FULL, QUICK, tasks, choose, measure, seconds, claims, "--part eqco"
)
