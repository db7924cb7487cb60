"""Training on pictures with the mean picture removed, which helps a vision tower that starts from nothing.

Convolution is linear, so conv(x - m) = conv(x) - conv(m): at saving, conv(m) moves into the position embedding and the
checkpoint is an ordinary one.
"""

from __future__ import annotations

from torch import Tensor, nn

from ki_edge.model import Pi05

PATCHES = "vision.embeddings.patch_embedding."
POSITIONS = "vision.embeddings.position_embedding.weight"


class CenteredPatches(nn.Conv2d):
    """A patch embedding that subtracts `center` f32 [1,3,h,w] (pixels in [-1,1]) from its input."""

    center: Tensor

    @classmethod
    def install(cls, model: Pi05, center: Tensor) -> None:
        """Replace the model's patch embedding; its parameters stay the same objects."""
        old = model.vision.embeddings.patch_embedding
        new = cls(old.in_channels, old.out_channels, old.kernel_size, old.stride)  # type: ignore[arg-type]
        new.weight, new.bias = old.weight, old.bias
        new.register_buffer("center", center, persistent=False)
        model.vision.embeddings.patch_embedding = new

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels - self.center)

    @staticmethod
    def center_of(model: Pi05) -> Tensor | None:
        """The installed centre, or None."""
        patches = model.vision.embeddings.patch_embedding
        return patches.center if isinstance(patches, CenteredPatches) else None


class Folding:
    """Turns the tensors of a model with `center` into those of an ordinary one that computes the same.

    It is given one after the other by name; the patch embedding's weight comes before the positions.
    """

    def __init__(self, center: Tensor) -> None:
        self._center = center.cpu()
        self._weight: Tensor | None = None

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """The tensor to be saved, f32 on the CPU."""
        if name == PATCHES + "weight":
            self._weight = value
        if name == POSITIONS:
            assert self._weight is not None
            return value - _share_of_center(self._weight, self._center)
        return value


def _share_of_center(weight: Tensor, center: Tensor) -> Tensor:
    """What the centre contributes to each patch, [P,width]."""
    return nn.functional.conv2d(center, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)[0]


def mean_picture(images: Tensor) -> Tensor:
    """Mean over pictures u8 [P,h,w,3]: f32 [1,3,h,w] in [-1,1], one for all cameras."""
    mean = images.float().mean(dim=0) / 255.0 * 2.0 - 1.0
    return mean.permute(2, 0, 1)[None].contiguous()
