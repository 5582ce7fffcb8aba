"""Stage 1: the linear map behind a row, whatever kind of module computes it.

Nothing here knows where a model is read: it judges one module and what came into it.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


class Pointwise(nn.Linear):
    """A 1x1 convolution of a single position, as the linear map that it is.

    It has no parameters of its own: `weight` and `bias` are those of the convolution, so that
    gradients reach it and what is written changes it.

    Args:
        convolution: With one group.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = convolution.in_channels, convolution.out_channels
        self.convolution = convolution

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nobody puts another in its place
        """`(M, C)` view of the weight of the convolution."""
        return self.convolution.weight[:, :, 0, 0]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """`(M,)` bias of the convolution, if it has one."""
        return self.convolution.bias


def is_head(module: nn.Module, x: object) -> bool:
    """Return whether the module maps `x` linearly, and `x` is one row per image."""
    if not isinstance(x, Tensor) or x.ndim < 2:
        return False
    if isinstance(module, nn.Linear):
        return x[0].numel() == module.in_features
    is_pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    return is_pointwise and x.shape[1:].numel() == module.in_channels


def linear_map(module: nn.Module, x: Tensor, logits: Tensor) -> nn.Linear | None:
    """Return the module as a linear map, if it is nothing but one of its own parameters.

    Args:
        module: For which `is_head` holds.
        x: What it was called with, one row per image.
        logits: `(N, M)` what came out.

    Returns:
        A map whose weight can be read and written; None where writing would be lost, or the
        formula is another one or cannot be told.
    """
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return None  # weight norm and other parametrisations: writing to it would be lost
    is_subclass = type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward)
    if is_subclass and not module.weight.any():
        return None  # a formula that cannot be told from zeros
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return None
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if isinstance(module, nn.Linear):
            alike = same(linear(x.flatten(1), module.weight, module.bias), logits)
            return module if alike else None
        alike = same(conv2d(x, module.weight, module.bias).flatten(1), logits)
        return Pointwise(module) if alike else None


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal to the last bit, NaN included."""
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, 0, 0, equal_nan=True)
