"""What a type checker lets pass and what it does not, which `make lint` looks at: an error that is
ignored must be one."""

import torch
from torch import Tensor

import contrastive_kernels as ck

x, y = torch.randn(8, 4), torch.randn(8, 4)
loss: Tensor = ck.info_nce(x, y, temperature=0.1, reduction="mean")
value, found = ck.info_nce(x, y, negatives=[y], return_stats=True)
sum_of_both: Tensor = loss + value
accuracy: Tensor | None = found.accuracy
stats: ck.LossStats = found
ck.info_nce(x, y, temprature=0.1)  # type: ignore[call-overload]
ck.info_nce(x, y, temperature="cold")  # type: ignore[call-overload]
distilled: Tensor = ck.clip_distill(x, y, 1.0, x, y, 1.0)
ck.clip_distill(x, y, 1.0, x, y)  # type: ignore[call-arg]

module = ck.InfoNCE(temperature=0.2)
loss = module(x, y)

rows: ck.RowStats = ck.row_stats(x, y, scale=2.0)
both: ck.RowColumnStats = ck.row_stats(x, y, columns=True)
wrong: ck.RowStats = ck.row_stats(x, y, columns=True)  # type: ignore[assignment]
ck.row_stats(x, y, scales=2.0)  # type: ignore[call-overload]

z: Tensor = ck.whiten(x)
z, ok = ck.whiten(x, return_info=True)
failed: Tensor = ~ok

queue = ck.FeatureQueue(16, 4, dtype=torch.bfloat16)
queue.enqueue(x)
negatives: Tensor = queue.negatives
source: ck.NegativeSource = ck.FileNegatives("rows.npy")
loss = ck.info_nce(x, y, negatives=source)
