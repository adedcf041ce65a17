"""Drop-in forms of the losses of other packages, under their names, arguments and defaults.

`from lightly.loss import NTXentLoss` becomes
`from contrastive_kernels.integrations.lightly import NTXentLoss`; or `contrastive_kernels.patch`
sets fused methods on the package's own classes. No peer is imported before its integration is.
"""

from .swap import PEERS, SwapStatus, patch, patch_status, patched, unpatch

__all__ = ["PEERS", "SwapStatus", "patch", "patch_status", "patched", "unpatch"]
