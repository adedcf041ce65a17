"""Late interaction, against what scores all pairs of tokens."""

from torch import Tensor

import contrastive_kernels as ck

from ..baselines import late
from . import oracle
from .case import Case
from .inputs import Sizes, token_sets


def late_interaction(queries: Tensor, documents: Tensor, *, backend: str = "auto") -> Tensor:
    return ck.late_interaction(queries, documents, normalize=False, backend=backend)


CASES = (
    Case(
        "late_interaction",
        "late",
        late_interaction,
        Sizes(32, 64, k=2),
        token_sets,
        oracle.whole(late.contrast(late.dense_scores)),
        {},
        (late.DENSE.bounded(0.35), late.PYLATE.bounded(0.35)),
        memory=True,
    ),
)
