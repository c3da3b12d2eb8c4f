"""Options of `msd sample` that begin from pictures, or lie between two seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.records import check

if TYPE_CHECKING:
    from torch import Tensor

    from multistage_diffusion.data.examples import Codec, Examples
    from multistage_diffusion.sampling import Start
else:
    Codec = Examples = Start = Tensor = Any


@dataclass(frozen=True, kw_only=True)
class EditingOptions:
    """From given images, and from seed to seed."""

    start: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Picture, folder of pictures or npy/npz file to begin from, with --from-sigma or --mask; of the run's size."""
    from_sigma: float | None = None
    """Noise level that the images of --from are noised to: the lower, the more of them stays."""
    mask: str | None = None
    """Picture of the same size that says what of the images of --from is repainted: white is, black is kept."""
    resample: int = 1
    """How often each step is made with --mask (RePaint): more fits what is repainted to the rest, and takes longer."""
    interpolate: tuple[int, int] | None = None
    """Two seeds: draw --num images on the way from the first to the second."""

    def require(self) -> None:
        """Refuse options that need others."""
        if self.start is None and (self.from_sigma is not None or self.mask is not None):
            option = "--mask" if self.mask is not None else "--from-sigma"
            raise ConfigError(f"{option} needs --from, the images to begin from")
        if self.resample != 1 and self.mask is None:
            raise ConfigError(f"--resample {self.resample} needs --mask, what to repaint")
        if self.start is not None and self.mask is None and self.from_sigma is None:
            raise ConfigError("--from needs --from-sigma, a noise level to begin at, or --mask, what to repaint")

    def document(self) -> dict[str, Any]:
        """What `samples.json` says of them."""
        values = {"from": self.start, "from_sigma": self.from_sigma, "mask": self.mask, "interpolate": self.interpolate}
        return {name: value for name, value in values.items() if value is not None} | (
            {"resample": self.resample} if self.mask is not None else {}
        )

    def read(self, shape: tuple[int, int, int], codec: Codec | None) -> Given | None:
        """Read the images and the mask.

        Args:
            shape: (C, H, W) of what the model draws.
            codec: Makes it of images; none for a run on pictures.

        Raises:
            DataError: A file is missing or damaged.
            ConfigError: An image or the mask is of another size.
        """
        if self.start is None:
            return None
        from torch.nn.functional import adaptive_max_pool2d

        examples = _examples(self.start, fields=codec is not None and not codec.pictures)
        pixels = examples.floats()
        x = pixels if codec is None else codec.encode(examples).floats()
        if codec is None and len(x[0]) == 1:
            x = pixels = x.expand(-1, shape[0], -1, -1)  # grey is a colour
        if tuple(x.shape[1:]) != shape:
            latents = "" if codec is None or not codec.pictures else f", latents of {_size(x.shape[1:])},"
            raise ConfigError(
                f"--from {self.start}: images of {_size(pixels.shape[1:])}{latents} do not fit a run that draws "
                f"{_size(shape)}"
            )
        if self.mask is None:
            return Given(self, x, pixels)
        mask = _examples(self.mask, fields=False).floats()
        height, width = pixels.shape[2:]
        if tuple(mask.shape[2:]) != (height, width):
            raise ConfigError(
                f"--mask {self.mask} is of {_size(mask.shape[2:])}, and the images of --from are of {height}x{width}"
            )
        check(len(mask) == 1, "mask", "one picture", len(mask))
        repainted = (mask.mean(1, keepdim=True) > 0).float()
        return Given(self, x, pixels, repainted[0, 0] > 0, adaptive_max_pool2d(repainted, shape[1:])[0, 0] > 0)


@dataclass(frozen=True, eq=False)
class Given:
    """What was read.

    Attributes:
        options: From where.
        x: The images as the model sees them.
        pixels: The images themselves.
        repainted: Where the images are repainted, if there is a mask.
        mask: Where what the model sees is.
    """

    options: EditingOptions
    x: Tensor
    pixels: Tensor
    repainted: Tensor | None = None
    mask: Tensor | None = None

    def start(self, num: int) -> Start:
        """The images in turn, one for each of those that are drawn."""
        import torch

        from multistage_diffusion.sampling import Start

        options, rows = self.options, torch.arange(num) % len(self.x)
        return Start(images=self.x[rows], sigma=options.from_sigma, mask=self.mask, resample=options.resample)

    def with_kept(self, images: Tensor) -> Tensor:
        """Decoded images with the kept pixels as they were, which an autoencoder changes."""
        import torch

        if self.repainted is None:
            return images
        return images.where(self.repainted, self.pixels[torch.arange(len(images)) % len(self.pixels)])


def _examples(path: str, *, fields: bool) -> Examples:
    """A picture, the pictures of a folder in the order of their names, or an array."""
    from multistage_diffusion.data.arrays import read_npy, read_npz
    from multistage_diffusion.data.collection import Reading, collect
    from multistage_diffusion.data.decode import read_regular
    from multistage_diffusion.data.files import read_folder
    from multistage_diffusion.data.layout import Entry

    place = Path(path)
    if place.suffix in (".npy", ".npz"):
        read = read_npy if place.suffix == ".npy" else read_npz
        return read(path, place, "none" if fields else "pictures").images
    if fields:
        raise ConfigError(f"--from {path}: the run draws fields; give an npy or npz file")
    if place.is_dir():
        return read_folder(path, place, Reading(labels="none")).images
    return collect(path, [Entry(place.name, lambda: read_regular(place))], Reading()).images


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
