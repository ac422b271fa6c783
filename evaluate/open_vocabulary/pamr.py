"""PAMR: masks that are smoothed within what looks alike in an image (pixel-adaptive mask refinement, Araslanov and
Roth 2020).

Whatever is said of many classes is refined by one affinity, which depends on the image alone. Knows nothing of classes,
windows or heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from cache_schema.masks import Size

_CLASSES_AT_ONCE = 32
"""Columns of the table that rows are gathered from: 128 bytes a row, so that a pixel's neighbours stay in the cache."""

_STRIP_PX, _STRIP_ON_DEVICE_PX = 2**11, 2**17
"""How many pixels are compared with their neighbours at once: as many as a CPU's cache holds, or a device is kept busy
with."""


@dataclass(frozen=True)
class Pamr:
    """How masks are refined.

    Args:
        iterations: how often every pixel is replaced by its weighted neighbours.
        dilations: distances in pixels at which a pixel's eight neighbours are taken. Beyond the edge of the image
            stands its nearest pixel.

    Raises:
        ValueError: there is no iteration or no dilation, or a dilation is below 1.
    """

    iterations: int = 10
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"PAMR takes at least one iteration and dilations of at least 1 pixel; got {self}")

    @torch.no_grad()
    def affinity(self, image: Float[Tensor, "3 h w"]) -> Affinity:
        """How much each pixel of an image takes from each of its neighbours; once for all masks of the image.

        The softmax, over the neighbours, of the mean over channels of -|difference| / (1e-8 + 0.1 sigma), where sigma
        is the channel's unbiased standard deviation over the neighbours and the pixel itself, which counts once for
        each dilation. Since differences are measured in sigmas, the range of the image plays no part, be it 0 to 1, 0
        to 255 or normalised (the same mean and scale for all pixels of a channel): only sigmas near 1e-7 would tell.

        It is computed in float32, or float64 for an image of that type, on the image's device; it holds 384 bytes a
        pixel in float32 with six dilations.
        """
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        size = image.shape[1], image.shape[2]
        neighbours = _neighbours(size, self.dilations, image.device)
        weights = torch.empty(neighbours.shape, dtype=image.dtype, device=image.device)
        strip = _STRIP_PX if image.device.type == "cpu" else _STRIP_ON_DEVICE_PX
        pixels = image.flatten(1)
        for start in range(0, len(neighbours), strip):
            _weigh(pixels, start, neighbours[start : start + strip], out=weights[start : start + strip])
        return Affinity(size, self.iterations, neighbours, weights)


@dataclass(frozen=True, eq=False)
class Affinity:
    """The neighbours of the n pixels of one image, row by row, k of them each, and how much each pixel takes of them.

    Args:
        size: (H, W) of the image.
        neighbours: places of the neighbours among the n pixels.
        weights: from 0 to 1; those of a pixel add up to 1.
    """

    size: Size
    iterations: int
    neighbours: Int32[Tensor, "n k"]
    weights: Float[Tensor, "n k"]

    @torch.no_grad()
    def refine(self, masks: Float[Tensor, "c mask_h mask_w"]) -> Float[Tensor, "c h w"]:
        """Masks after all iterations: each replaces every pixel by the weighted sum of its neighbours.

        Masks of another size than the image's are brought to it first, bilinear with align_corners. Any number of
        classes takes little more memory than the masks that come in and go out, for few are refined at a time; how
        many plays no part in what comes out.

        Args:
            masks: of c classes, in any range, on the image's device.

        Returns:
            The refined masks at the image's size, in the data type of `weights`.
        """
        refined = self.weights.new_empty((len(masks), len(self.weights)))
        for start in range(0, len(masks), _CLASSES_AT_ONCE):
            some = masks[start : start + _CLASSES_AT_ONCE].to(self.weights.dtype)
            if some.shape[1:] != self.size:
                some = F.interpolate(some[None], self.size, mode="bilinear", align_corners=True)[0]
            # A row for each pixel: a sum of weighted rows of a table is what an embedding bag computes.
            table = some.flatten(1).T.contiguous()
            for _ in range(self.iterations):
                table = F.embedding_bag(self.neighbours, table, mode="sum", per_sample_weights=self.weights)
            refined[start : start + _CLASSES_AT_ONCE] = table.T
        return refined.view(len(masks), *self.size)


def _neighbours(size: Size, dilations: tuple[int, ...], device: torch.device) -> Int32[Tensor, "n k"]:
    """Where the neighbours of each pixel lie, the nearest pixel of the image standing for those beyond its edge."""
    height, width = size
    rows = torch.arange(height, dtype=torch.int32, device=device)[:, None]
    columns = torch.arange(width, dtype=torch.int32, device=device)
    steps = [
        (down * dilation, right * dilation)
        for dilation in dilations
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if down or right
    ]
    neighbours = torch.empty((height, width, len(steps)), dtype=torch.int32, device=device)
    for number, (down, right) in enumerate(steps):
        row, column = (rows + down).clamp_(0, height - 1), (columns + right).clamp_(0, width - 1)
        neighbours[..., number] = row * width + column
    return neighbours.flatten(0, 1)


def _weigh(
    pixels: Float[Tensor, "3 n"], start: int, neighbours: Int32[Tensor, "s k"], out: Float[Tensor, "s k"]
) -> None:
    """Write the weights of the neighbours of s pixels, from the one at `start` on, to `out`."""
    num_pixels, num_neighbours = neighbours.shape
    differences = pixels.index_select(1, neighbours.flatten()).view(3, num_pixels, num_neighbours)
    differences -= pixels[:, start : start + num_pixels, None]
    # The pixel itself, eight neighbours a dilation: it counts once for each, with a difference of 0. With a ninth of
    # all values known to be 0, the squared sum is at most 8/9 of what it is subtracted from: little is cancelled.
    num_values = num_neighbours // 8 * 9
    squares, total = differences.square().sum(-1), differences.sum(-1)
    sigma = ((squares - total.square() / num_values) / (num_values - 1)).sqrt()
    differences.abs_().div_((1e-8 + 0.1 * sigma)[..., None])
    torch.softmax(-differences.mean(0), -1, out=out)
