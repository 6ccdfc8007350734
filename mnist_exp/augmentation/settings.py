"""The settings of augmentation. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images; a key is off at 0, and all of them compose."""

    shift: float = 0.0  # the greatest shift in pixels, along each axis
    rotation: float = 0.0  # the greatest angle in degrees, either way round
    scale: float = 0.0  # each axis is scaled by itself, by 1 - scale to 1 + scale
    shear: float = 0.0  # the greatest angle in degrees, of columns, either way
    elastic: float = 0.0  # the standard deviation of the control points' displacement in pixels
    erase: int = 0  # the side of an erased square in pixels
    mixup: float = 0.0  # both parameters of the Beta distribution of the shares
    flip: float = 0.0  # the probability of a horizontal flip

    @property
    def is_on(self) -> bool:
        """True where it changes images."""
        return self != Augmentation()

    @property
    def resamples(self) -> bool:
        """True where pixels come to lie between pixels, so that they are interpolated."""
        angles = self.rotation or self.scale or self.shear or self.elastic
        return bool(angles or self.shift % 1)

    def describe(self) -> str:
        """Return what is on: "shift=2 rotation=12"."""
        return " ".join(f"{name}={value:g}" for name, value in vars(self).items() if value)
