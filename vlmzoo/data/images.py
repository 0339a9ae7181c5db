"""Images -> pixel values: files within their folder, capped before decoding, decoded whole or not at all."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from vlmzoo.connector import Grid
from vlmzoo.files import StoredBytes
from vlmzoo.registry import shown

MAX_PIXELS = 64_000_000

ImageFile = Path | StoredBytes


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and, where it is known, the record.

    `kind` says in a word what is wrong.
    """

    def __init__(self, message: str, kind: str = "broken-image") -> None:
        super().__init__(message)
        self.kind = kind


def image_path(folder: Path, name: str, where: str) -> Path:
    """The resolved path of an image below a resolved folder.

    Raises:
        ImageError: no such file, or one outside the folder (an absolute path, `..`, a link that leads out).
    """
    try:
        path = (folder / name).resolve()
        found = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error  # a name too long, a NUL in it, links in a circle
        raise ImageError(f"{where}: image {shown(name)} is no usable path ({reason})", "missing-image") from None
    if not path.is_relative_to(folder):
        raise ImageError(f"{where}: image {shown(name)} lies outside the image folder {folder}", "image-outside")
    if not found:
        raise ImageError(f"{where}: image {shown(name)} is not in {folder}", "missing-image")
    return path


def load_image(path: ImageFile, *, where: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in RGB; its `format` is the file's, whatever the file's name says.

    Args:
        where: names the record in messages.
        max_pixels: of the smallest square around the image, which mode `pad` will allocate.

    Raises:
        ImageError: the file is missing, no image, truncated, or too large; the size is read before the pixels are.
    """
    with _opened(path, where, max_pixels) as image:
        pixels = image.convert("RGB")
        pixels.format = image.format
        return pixels


def image_size(path: ImageFile, *, where: str = "") -> tuple[int, int]:
    """(height, width) in pixels, which are not decoded; raises as `load_image`."""
    with _opened(path, where, MAX_PIXELS) as image:
        return image.height, image.width


@contextmanager
def _opened(path: ImageFile, where: str, max_pixels: int) -> Iterator[Image.Image]:
    name = f"{where}: image {path}" if where else f"image {path}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap is below
            warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # broken EXIF tags are no pixels
            image = Image.open(path if isinstance(path, Path) else io.BytesIO(path.read()))
        with image:
            width, height = image.size
            if max(width, height) ** 2 > max_pixels:
                side = int(max_pixels**0.5)
                raise ImageError(
                    f"{name} is {width} x {height} pixels; at most {side} x {side} are decoded", "too-many-pixels"
                )
            yield image
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name} has more pixels than can be decoded safely; at most {max_pixels} are", "too-many-pixels"
        ) from None
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist", "missing-image") from None
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:  # as PIL's decoders fail
        raise ImageError(f"{name} cannot be decoded ({error})") from None


def to_pixel_values(
    image: Image.Image, image_processor: Any, mode: Literal["square", "pad"], image_size: int
) -> Tensor:
    """Pixel values (3, image_size, image_size), resized and normalised by the encoder's own image processor.

    `square` scales the shorter side and crops the centre, for every encoder; `pad` first expands the image to a
    square with the processor's mean colour, so that nothing is lost.

    Source: Liu et al., Improved Baselines with Visual Instruction Tuning (2024); `expand2square` in LLaVA's code.
    """
    if mode == "pad":
        image = _expand_to_square(image, tuple(int(mean * 255) for mean in image_processor.image_mean))
    output = image_processor(
        image,
        size={"shortest_edge": image_size},
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        return_tensors="pt",
    )
    return output["pixel_values"][0]


def native_size(size: tuple[int, int], patch: int, max_patches: int) -> tuple[int, int]:
    """The largest (height, width), in whole patches, at which an image in its proportions has at most so many.

    Source: Tschannen et al., SigLIP 2 (2025), section 3.4.1 (NaFlex), and its code, which searches in this way.
    """

    def scaled(scale: float) -> tuple[int, int]:
        height, width = (max(patch, math.ceil(side * scale / patch) * patch) for side in size)
        return height, width

    least, most = 1e-6, 100.0
    while most - least >= 1e-5:
        middle = (least + most) / 2
        height, width = scaled(middle)
        least, most = (middle, most) if height * width <= max_patches * patch**2 else (least, middle)
    return scaled(least)


def to_native_pixel_values(image: Image.Image, image_processor: Any, size: tuple[int, int]) -> Tensor:
    """Pixel values (3, height, width) of the whole image, stretched to this size, normalised by the processor."""
    resized = image.resize((size[1], size[0]), image_processor.resample)
    given = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    return image_processor(resized, **given)["pixel_values"][0]


def cut(image: Image.Image, tiles: Grid, side: int, resample: int) -> list[Image.Image]:
    """The image as a thumbnail, then as rows and columns of tiles, row by row, all of them squares of `side` pixels.

    The thumbnail is the whole image, stretched; the tiles show it in its proportions, centred on black.

    Source: Liu et al., LLaVA-NeXT (2024); `process_anyres_image` in LLaVA's code.
    """
    height, width = tiles[0] * side, tiles[1] * side
    down, across = height / image.height, width / image.width
    if across < down:
        fitted = width, min(math.ceil(image.height * across), height)
    else:
        fitted = min(math.ceil(image.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(fitted, resample), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
    squares = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
    return [image.resize((side, side), resample), *squares]


def _expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
