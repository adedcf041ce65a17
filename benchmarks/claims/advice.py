"""Which loss should I take: one sentence for each verdict, and the costs that were measured.

The sentences are written before the results; a verdict picks one. A claim that was not run gives no
advice, and says so.
"""

import json

from ..harness.paths import RESULTS
from .verdict import NOT, OPEN, PART, SEEN, Claim

COSTS = RESULTS / "amd-epyc-family-25-model-17-2-threads.json"
CASES = ("info_nce_small", "eqco_small", "debiased_small", "hcl_small", "cacr_small", "w_mse_small")
# part, place of the claim in it, and what to do where it is seen, in part, and not
SENTENCES: tuple[tuple[str, int, dict[str, str]], ...] = (
    ("eqco", 0, {
        SEEN: "`info_nce` with as many negatives as you can have; with very few it loses.",
        NOT: "`info_nce` with the negatives that a batch brings: more brought nothing here.",
    }),
    ("eqco", 1, {
        SEEN: "Few negatives: `eqco`, which with them is as good as with many.",
        PART: "Few negatives: try `eqco`; it made up for them in part.",
        NOT: "Few negatives: find more; `eqco` did not make up for them.",
    }),
    ("eqco", 3, {
        SEEN: "No room for a queue: keys of the same step and `eqco` (SiMo) do as well.",
        PART: "No room for a queue: keys of the same step and `eqco` (SiMo), not the fewest.",
        NOT: "A queue is worth its room: keys of the same step (SiMo) did worse, or it is open.",
    }),
    ("cacr", 0, {
        SEEN: "Balanced data, one positive or several: `cacr`.",
        PART: "Balanced data: `cacr` against some of the others, see the table.",
        NOT: "Balanced data: nothing speaks for `cacr` over `info_nce`, `debiased` or `hcl`.",
    }),
    ("cacr", 1, {
        SEEN: "Data with a long tail: `cacr`.",
        PART: "Data with a long tail: `cacr` against some of the others, see the table.",
        NOT: "Data with a long tail: nothing speaks for `cacr` over the others.",
    }),
    ("cacr", 5, {
        SEEN: "Negatives few or ill chosen: `cacr`, with one positive too.",
        PART: "Negatives few or ill chosen: `cacr` helps in one of the two, see the table.",
        NOT: "Negatives few or ill chosen: `cacr` suffers no less than `info_nce`.",
    }),
    ("infomin", 3, {
        SEEN: "Views matter whatever the loss: augment, and stop before the task is gone.",
        PART: "Views matter whatever the loss: one side of the hill was seen.",
        NOT: "The strength of augmentation made no hill here.",
    }),
    ("wmse", 2, {
        SEEN: "No negatives wanted: `w_mse`, no worse than `info_nce` at equal compute.",
        PART: "No negatives wanted: `w_mse`, no worse than `info_nce` with some views.",
        NOT: "No negatives wanted: `w_mse` works without; whether as well is not shown.",
    }),
    ("wmse", 1, {
        SEEN: "Views are cheap: four of each image for `w_mse` rather than two of twice as many.",
        NOT: "`w_mse` with two views: four of half as many images were not better.",
    }),
)  # fmt: skip


def lines(made: dict[str, list[Claim]]) -> list[str]:
    """Ten lines of Markdown at the most."""
    told, silent = [], 0
    for part, place, sentences in SENTENCES:
        verdict = made[part][place].verdict()
        if verdict == OPEN:
            silent += 1
        else:
            # a claim of one condition is seen or not
            told.append(f"- {sentences.get(verdict, sentences[NOT])} ({verdict})")
    if silent:
        some = f"{silent} of {len(SENTENCES)} answers are" if told else "The answers are"
        told.append(f"- {some} not there: the claims they rest on were not run to their end.")
    return told + [f"- Costs: {costs()}."]


def costs() -> str:
    """Of a batch of 256 on a CPU, from the table of benchmarks."""
    cases = {case["name"]: case for case in json.loads(COSTS.read_text())["cases"]}
    parts = []
    for name in CASES:
        ours = cases.get(name, {}).get("ours", {})
        if "milliseconds" in ours:
            parts.append(f"`{name[:-6]}` {ours['milliseconds']['median']:.1f} ms")
    return "a batch of 256, D = 128, forward and backward on a CPU: " + ", ".join(parts)
