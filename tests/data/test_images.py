import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil

from vlmzoo.data.images import ImageError, cut, image_size, load_image, to_pixel_values


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    for mode in ("L", "1", "P", "RGBA", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (6, 4)).save(path)
        image = load_image(path)
        assert (image.mode, image.size) == ("RGB", (6, 4))


@pytest.mark.filterwarnings("error")
def test_broken_tags_of_a_sound_image_are_not_told_of(tmp_path: Path) -> None:
    exif, file = Image.Exif(), tmp_path / "a.jpg"
    exif[0x010E] = "a description of some length"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(file, exif=exif.tobytes())
    data = bytearray(file.read_bytes())
    data[data.find(b"Exif") + 20] = 255  # the length of the text
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="larger than file|EXIF"), Image.open(file):
        pass
    assert load_image(file).size == (8, 8)


def test_truncated_files_name_the_record(image_folder: Path) -> None:
    for name in ("a.png", "sub/b.jpg"):
        path = image_folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ImageError, match=rf"^train\.json\[3\]: image .*{path.name} cannot be decoded") as caught:
            load_image(path, where="train.json[3]")
        assert "\n" not in str(caught.value)


def test_what_is_no_image(image_folder: Path) -> None:
    (image_folder / "text.png").write_text("not an image")
    (image_folder / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png"):
        with pytest.raises(ImageError, match=rf"{name} cannot be decoded"):
            load_image(image_folder / name)
    with pytest.raises(ImageError, match=r"absent\.png does not exist"):
        load_image(image_folder / "absent.png")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends where its pixels should begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (60_000, 1), (1, 9000), (30_000, 30_000)])
@pytest.mark.filterwarnings("error")
def test_huge_images_are_refused_before_decoding(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(width, height))  # decoding would say "truncated"
    with pytest.raises(ImageError, match=r"(is \d+ x \d+ pixels; at most 8000 x 8000|more pixels than)"):
        load_image(path)


def test_the_cap_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (10, 4)).save(path)
    assert load_image(path, max_pixels=100).size == (10, 4)
    with pytest.raises(ImageError, match=r"is 10 x 4 pixels; at most 9 x 9"):
        load_image(path, max_pixels=99)


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (40, 40), (31, 50)])
def test_square_is_clips_own_preprocessing(size: tuple[int, int]) -> None:
    image = _noise(*size)
    own = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = own(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(to_pixel_values(image, CLIPImageProcessorPil(), "square", 28), expected)


@pytest.mark.parametrize("processor", [CLIPImageProcessorPil(), SiglipImageProcessorPil()])
@pytest.mark.parametrize("size", [(50, 30), (30, 50), (31, 50)])
def test_pad_keeps_everything_on_the_mean_colour(size: tuple[int, int], processor: object) -> None:
    image = _noise(*size)
    side = max(size)
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = [int(mean * 255) for mean in processor.image_mean]  # pyright: ignore[reportAttributeAccessIssue]
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(image)
    same_size = to_pixel_values(image, processor, "pad", side)
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.allclose(same_size * std + mean, torch.tensor(canvas).permute(2, 0, 1) / 255, atol=1e-5)
    assert to_pixel_values(image, processor, "pad", 14).shape == (3, 14, 14)


def test_siglip_squares_by_cropping_not_by_squashing() -> None:
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))  # the blue centre is all that a crop leaves
    pixels = to_pixel_values(image, SiglipImageProcessorPil(), "square", 20)
    assert pixels[0].max() == -1
    assert pixels[2].min() == 1


def test_a_size_is_read_without_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    _noise(50, 30).save(path)
    path.write_bytes(path.read_bytes()[:100])
    assert image_size(path) == (30, 50)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ImageError, match=r"^train\.json\[3\]: image .*text\.png cannot be decoded"):
        image_size(tmp_path / "text.png", where="train.json[3]")


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (24, 48), (61, 7), (7, 90), (10, 10), (100, 101)])
@pytest.mark.parametrize("tiles", [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
def test_tiles_are_those_of_llava_next(size: tuple[int, int], tiles: tuple[int, int]) -> None:
    image = _noise(*size)
    crop = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    theirs = LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=[[tiles[0] * 24, tiles[1] * 24]])
    ours = CLIPImageProcessorPil(**crop)
    found = torch.stack([to_pixel_values(part, ours, "square", 24) for part in cut(image, tiles, 24, ours.resample)])
    assert torch.equal(found, theirs(image, return_tensors="pt")["pixel_values"][0])


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
