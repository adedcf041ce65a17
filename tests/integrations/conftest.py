"""Peers as they are installed. torchvision comes with compiled operators that a CPU build of torch
cannot load; its Python part, all that peers use here, needs to find them declared."""

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
