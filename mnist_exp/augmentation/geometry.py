"""Moves of pixels: shifts by whole pixels, and smooth maps by a grid of control points."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_exp.augmentation.draws import CONTROLS, Draws
from mnist_exp.augmentation.settings import Augmentation

AFFINE = ("shift", "rotation", "scale", "shear")  # one after the other in what is drawn


def shift_whole_pixels(images: Tensor, draws: Draws, most: int) -> Tensor:
    """Return images [M, C, H, W] shifted by up to `most` pixels along each axis, 0 moving in."""
    count, _, height, width = images.shape
    # of the window in a padded image: an image moves right and down as its window moves left and up
    left, top = (2 * most - n for n in draws.integers("shift", [2 * most + 1] * 2))  # [M]
    device, wide = images.device, width + 2 * most
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    window = (rows[:, None] * wide + columns).flatten()  # [H * W]
    places = (top * wide + left)[:, None] + window  # [M, H * W]
    padded = F.pad(images, [most] * 4).flatten(2)
    places = places[:, None].expand(-1, images.shape[1], -1)
    return padded.gather(2, places).view(count, -1, height, width)


class SmoothMap:
    """A random affine map and an elastic deformation of images, sampled once for both.

    An image point is moved by a uniform cubic B-spline of 7 x 7 control points (Rueckert et al.
    1999). Where the control points are moved by an affine map the spline is that map, exactly: so
    they are moved by it, and by normal displacements, and the grid follows in a small matrix
    product along each axis.
    """

    def __init__(
        self, settings: Augmentation, height: int, width: int, device: torch.device
    ) -> None:
        self.elastic = settings.elastic
        shift, scale, degree = settings.shift, settings.scale, math.pi / 180
        angles = settings.rotation * degree, settings.shear * degree
        most = [shift, shift, angles[0], scale, scale, angles[1]]  # in the order of AFFINE
        self.most = torch.tensor(most, device=device)
        # seen from the middle of the image, in pixels
        offsets = torch.arange(CONTROLS, device=device) - CONTROLS // 2
        self.rows = offsets[:, None] * (height / (CONTROLS - 3))  # [7, 1]
        self.columns = offsets[None] * (width / (CONTROLS - 3))  # [1, 7]
        self.row_weights = _spline_weights(height).to(device)  # [H, 7]
        self.column_weights = _spline_weights(width).to(device)
        # grid_sample wants an image to reach from -1 to 1
        self.unit = torch.tensor([2 / width, 2 / height], device=device)[:, None, None]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images [M, C, H, W], uint8, as float32, interpolated bilinearly, 0 moving in."""
        points = self._control_points(draws) * self.unit
        grid = self.row_weights @ (points @ self.column_weights.T)  # [M, 2, 7, 7] -> [M, 2, H, W]
        grid = grid.permute(0, 2, 3, 1)
        return F.grid_sample(images.float(), grid, align_corners=False)

    def _control_points(self, draws: Draws) -> Tensor:
        """Return where the image has come from that is at each control point: x and y [M, 2, 7, 7].

        An image is rotated, sheared, scaled and shifted, in this order; this goes back.
        """
        # drawn together, as on a CPU a call costs more than the numbers of a batch
        numbers = draws.symmetric(*AFFINE) * self.most
        right, down, angle, wide, high, slant = numbers[:, :, None, None].unbind(1)  # [M, 1, 1]
        y = (self.rows - down) / (1 + high)
        x = (self.columns - right) / (1 + wide) - slant.tan() * y
        cos, sin = angle.cos(), angle.sin()
        points = torch.stack([cos * x + sin * y, cos * y - sin * x], 1)
        if self.elastic:
            points = points + self.elastic * draws.normal("elastic").view(points.shape)
        return points


def _spline_weights(size: int) -> Tensor:
    """Return the share that each control point has in the place of each pixel, [size, 7]."""
    # the image reaches from the second control point to the last but one
    place = 1 + (torch.arange(size) + 0.5) * (CONTROLS - 3) / size
    distance = (place[:, None] - torch.arange(CONTROLS)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    return torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)
