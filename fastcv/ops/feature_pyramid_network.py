"""Feature pyramid network and the extra levels detectors put on top of it.

Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Conv2dNormActivation

__all__ = ["ExtraFPNBlock", "FeaturePyramidNetwork", "LastLevelMaxPool", "LastLevelP6P7"]


class ExtraFPNBlock(nn.Module):
    """Base class of blocks that add levels to the pyramid."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """From the pyramid's levels, the backbone's and the names: levels and names, extended."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class FeaturePyramidNetwork(nn.Module):
    """Merges the feature maps of a backbone, from the coarsest to the finest.

    Each map is brought to ``out_channels`` by a 1x1 convolution, the next coarser result is added
    to it (nearest neighbour upsampling), and a 3x3 convolution gives the output of the level.
    State dicts from before the convolutions became blocks (``inner_blocks.0.weight``) load too.

    Args:
        in_channels_list: channels of each map, finest first.
        out_channels: channels of every output.
        extra_blocks: an :class:`ExtraFPNBlock` which adds levels.
        norm_layer: called with ``out_channels`` after each convolution, which then has no bias;
            None for none.

    Raises:
        ValueError: a number of channels is 0; at the call, the number of maps is another.
        TypeError: ``extra_blocks`` is not a module.

    Example:
        >>> import torch, fastcv
        >>> fpn = fastcv.ops.FeaturePyramidNetwork([10, 20], 5)
        >>> maps = {"fine": torch.zeros(1, 10, 8, 8), "coarse": torch.zeros(1, 20, 4, 4)}
        >>> [(name, list(level.shape)) for name, level in fpn(maps).items()]
        [('fine', [1, 5, 8, 8]), ('coarse', [1, 5, 4, 4])]
    """

    _version = 2

    def __init__(
        self,
        in_channels_list: list[int],
        out_channels: int,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList()
        self.layer_blocks = nn.ModuleList()
        for channels in in_channels_list:
            if channels == 0:
                raise ValueError(f"in_channels_list: expected sizes of at least 1, got {in_channels_list}")
            for blocks, c, kernel_size in (
                (self.inner_blocks, channels, 1),
                (self.layer_blocks, out_channels, 3),
            ):
                blocks.append(
                    Conv2dNormActivation(c, out_channels, kernel_size, norm_layer=norm_layer, activation_layer=None)
                )
        _initialize_convolutions(self)
        if extra_blocks is not None and not isinstance(extra_blocks, nn.Module):
            raise TypeError(f"extra_blocks: expected an ExtraFPNBlock, got {extra_blocks!r}")
        self.extra_blocks = extra_blocks

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for blocks in ("inner_blocks", "layer_blocks"):
            for i in range(len(getattr(self, blocks))):
                for kind in ("weight", "bias"):
                    old = f"{prefix}{blocks}.{i}.{kind}"
                    if old in state_dict:
                        state_dict[f"{prefix}{blocks}.{i}.0.{kind}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps ``[N, C_i, H_i, W_i]`` by name, finest first; the same names in the result."""
        names, maps = list(x.keys()), list(x.values())
        if len(maps) != len(self.inner_blocks):
            raise ValueError(f"x: expected {len(self.inner_blocks)} feature maps, got {len(maps)}")
        results: list[Tensor] = []  # coarsest first
        merged = None
        for features, inner, layer in zip(
            reversed(maps), reversed(self.inner_blocks), reversed(self.layer_blocks), strict=True
        ):
            lateral = inner(features)
            if merged is not None:
                lateral = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            merged = lateral
            results.append(layer(merged))
        results.reverse()
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results, strict=True))


class LastLevelMaxPool(ExtraFPNBlock):
    """Adds a level "pool": every second pixel of the coarsest one (Lin et al., section 4.1).

    Example:
        >>> import torch, fastcv
        >>> from fastcv.ops.feature_pyramid_network import LastLevelMaxPool
        >>> levels, names = LastLevelMaxPool()([torch.zeros(1, 5, 8, 8)], [], ["p5"])
        >>> names, levels[-1].shape
        (['p5', 'pool'], torch.Size([1, 5, 4, 4]))
    """

    def forward(self, x: list[Tensor], y: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        pooled = F.max_pool2d(x[-1], kernel_size=1, stride=2, padding=0)
        return [*x, pooled], [*names, "pool"]


class LastLevelP6P7(ExtraFPNBlock):
    """Adds levels "p6" and "p7" by strided convolutions.

    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 4: p6 is computed from
    the backbone's last map, or from the pyramid's (p5) where ``in_channels`` is ``out_channels``.

    Args:
        in_channels: channels of the map p6 is computed from.
        out_channels: channels of p6 and p7.

    Example:
        >>> import torch, fastcv
        >>> from fastcv.ops.feature_pyramid_network import LastLevelP6P7
        >>> p5, c5 = torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 8, 8)
        >>> levels, names = LastLevelP6P7(6, 4)([p5], [c5], ["p5"])
        >>> names, [list(level.shape[-2:]) for level in levels]
        (['p5', 'p6', 'p7'], [[8, 8], [4, 4], [2, 2]])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        _initialize_convolutions(self)
        self.use_P5 = in_channels == out_channels

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        p7 = self.p7(F.relu(p6))
        return [*p, p6, p7], [*names, "p6", "p7"]


def _initialize_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
