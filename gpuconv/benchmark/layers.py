"""Layers of networks that people run, at their real extents, with where their numbers come from."""

from __future__ import annotations

from typing import NamedTuple

from gpuconv.arguments import Shape
from gpuconv.geometry import Geometry

CPU_BATCH, GPU_BATCH = 8, 32


class Layer(NamedTuple):
    """One convolution in channels_first terms, without its batch size."""

    name: str
    x: Shape  # (C, *spatial)
    w: Shape
    stride: int | Shape = 1
    padding: int = 0
    groups: int = 1
    batch_share: int = 1  # the batch size of the run is divided by this: large images come in small batches
    source: str = ""

    def geometry(self, batch: int) -> Geometry:
        """The convolution at this batch size."""
        size = max(1, batch // self.batch_share)
        return Geometry.infer((size, *self.x), self.w, stride=self.stride, padding=self.padding, groups=self.groups)


_RESNET = "ResNet-50, He et al. 2015, arXiv:1512.03385, table 1 (stride in the 3x3, as torchvision has it)"
_MOBILENET = "MobileNetV2, Sandler et al. 2018, arXiv:1801.04381, table 2"
_WAV2VEC = "wav2vec 2.0 feature encoder, Baevski et al. 2020, arXiv:2006.11477, one second at 16 kHz"
_R3D = "R3D-18 first stage, Tran et al. 2018, arXiv:1711.11248, 16 frames of 112x112"

LAYERS = (
    Layer("resnet stem 7x7 s2 3>64 @224", (3, 224, 224), (64, 3, 7, 7), 2, 3, source=_RESNET),
    Layer("resnet 1x1 64>256 @56", (64, 56, 56), (256, 64, 1, 1), source=_RESNET),
    Layer("resnet 1x1 256>64 @56", (256, 56, 56), (64, 256, 1, 1), source=_RESNET),
    Layer("resnet 3x3 64 @56", (64, 56, 56), (64, 64, 3, 3), 1, 1, source=_RESNET),
    Layer("resnet 3x3 s2 128 @56", (128, 56, 56), (128, 128, 3, 3), 2, 1, source=_RESNET),
    Layer("resnet 1x1 s2 256>512 @56", (256, 56, 56), (512, 256, 1, 1), 2, source=_RESNET),
    Layer("resnet 3x3 128 @28", (128, 28, 28), (128, 128, 3, 3), 1, 1, source=_RESNET),
    Layer("resnet 3x3 256 @14", (256, 14, 14), (256, 256, 3, 3), 1, 1, source=_RESNET),
    Layer("resnet 3x3 512 @7", (512, 7, 7), (512, 512, 3, 3), 1, 1, source=_RESNET),
    Layer("mobilenet depthwise 3x3 s2 96 @112", (96, 112, 112), (96, 1, 3, 3), 2, 1, 96, source=_MOBILENET),
    Layer("mobilenet depthwise 3x3 144 @56", (144, 56, 56), (144, 1, 3, 3), 1, 1, 144, source=_MOBILENET),
    Layer("mobilenet 1x1 144>24 @56", (144, 56, 56), (24, 144, 1, 1), source=_MOBILENET),
    Layer("wav2vec 1-D k3 s2 512 @3199", (512, 3199), (512, 512, 3), 2, source=_WAV2VEC),
    Layer("r3d 3-D 3x3x3 64 @16x56x56", (64, 16, 56, 56), (64, 64, 3, 3, 3), 1, 1, 1, 8, source=_R3D),
)

BY_NAME = {layer.name: layer for layer in LAYERS}
