"""InfoMin's view generator (Tian et al. 2020): an invertible colour model, and its sign flip."""

import torch
from torch import Tensor, nn

LAYERS = 6
HIDDEN = 8


class ColourFlow(nn.Module):
    """Pixel-wise affine coupling layers on three channels (Dinh et al. 2015 and 2017).

    One channel c of every pixel is changed by the two others r: c' = c exp(s(r)) + t(r), each layer
    another one; s and t are a small network of the pixel. At first s = t = 0: the model starts as
    the identity.

    Args:
        volume_preserving: leave s out (NICE), so that the map has determinant 1; else RealNVP.
    """

    def __init__(self, *, volume_preserving: bool):
        super().__init__()
        self.volume_preserving = volume_preserving
        self.layers = nn.ModuleList(_Coefficients() for _ in range(LAYERS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (N, 3, H, W) to as many, and log |det| of the map at each pixel, (N, H, W).

        Raises:
            ValueError: `pixels` has not three channels.
        """
        channels = _channels(pixels)
        log_det = torch.zeros_like(channels[0])
        for index, layer in enumerate(self.layers):
            log_scale, shift = self._coefficients(layer, _others(channels, index))
            channels[index % 3] = channels[index % 3] * log_scale.exp() + shift
            log_det = log_det + log_scale
        return _pixels(channels, pixels), log_det.view_as(pixels[:, 0])

    def inverse(self, pixels: Tensor) -> Tensor:
        """The pixels that `forward` maps to these."""
        channels = _channels(pixels)
        for index, layer in reversed(list(enumerate(self.layers))):
            log_scale, shift = self._coefficients(layer, _others(channels, index))
            channels[index % 3] = (channels[index % 3] - shift) * (-log_scale).exp()
        return _pixels(channels, pixels)

    def _coefficients(self, layer: nn.Module, others: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = layer(others)
        if self.volume_preserving:
            return torch.zeros_like(log_scale), shift
        return log_scale.tanh(), shift  # bounded: a layer scales by at most e


def views(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The first channel (N, 1, H, W), and the two others (N, 2, H, W)."""
    return pixels[:, :1], pixels[:, 1:]


class _SignFlip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


def flip_sign(x: Tensor) -> Tensor:
    """x, with a gradient of the opposite sign (Ganin and Lempitsky 2015).

    What comes before it is trained to maximise what comes behind it is trained to minimise: both
    sides of min_g max_f I_NCE in one backward pass, without second derivatives.
    """
    return _SignFlip.apply(x)


class _Coefficients(nn.Module):
    """Two channels of P pixels (2, P) to log scale and shift, (1, P) each.

    Products with all pixels in one long row: seven times as fast as convolutions of 1 x 1.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, HIDDEN)
        self.second = nn.Linear(HIDDEN, 2)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, others: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.addmm(self.first.bias[:, None], self.first.weight, others).relu()
        return torch.addmm(self.second.bias[:, None], self.second.weight, hidden).split(1)


def _channels(pixels: Tensor) -> list[Tensor]:
    """The three channels of (N, 3, H, W), each (1, N H W)."""
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must have shape (N, 3, H, W), got {tuple(pixels.shape)}")
    return list(pixels.transpose(0, 1).reshape(3, -1).split(1))


def _others(channels: list[Tensor], index: int) -> Tensor:
    """The two channels that layer `index` leaves as they are, (2, P)."""
    return torch.cat([channel for i, channel in enumerate(channels) if i != index % 3])


def _pixels(channels: list[Tensor], like: Tensor) -> Tensor:
    n, c, height, width = like.shape
    return torch.cat(channels).view(c, n, height, width).transpose(0, 1)
