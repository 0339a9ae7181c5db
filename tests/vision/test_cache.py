"""The feature cache: what an uncached run would compute, once, for everybody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.checkpoints import run_values, write_data, write_models
from tests.tiny import CLIP, SIGLIP
from vlmzoo import build
from vlmzoo.config import EncoderConfig, RunConfig, parse
from vlmzoo.connector import FeatureRequest
from vlmzoo.sweeps.trial import new_model
from vlmzoo.training.run import train
from vlmzoo.vision import cache as cache_module
from vlmzoo.vision.cache import FeatureCache
from vlmzoo.vision.encoder import VisionEncoder


def encoder(config: dict[str, Any] = CLIP, seed: int = 0, layer: int = -2) -> VisionEncoder:
    return VisionEncoder(build.vision(EncoderConfig(config=config), seed=seed), layer=layer).eval()


def to_pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path), dtype=np.float32)).permute(2, 0, 1) / 255


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Twenty pictures, the last of them a copy of the first."""
    (tmp_path / "images").mkdir()
    paths = []
    for index in [*range(19), 0]:
        paths.append(tmp_path / "images" / f"{len(paths)}.png")
        noise = np.random.default_rng(index).integers(0, 255, (24, 24, 3)).astype(np.uint8)
        Image.fromarray(noise).save(paths[-1])
    return paths


def opened(
    images: list[Path], folder: Path, tower: VisionEncoder | None = None, request: FeatureRequest | None = None
) -> FeatureCache:
    return FeatureCache(tower or encoder(), images, to_pixels, {"mode": "pad"}, request or FeatureRequest(), folder)


@pytest.mark.parametrize("shard", [1024, 8])
@pytest.mark.parametrize(
    ("config", "request_"),
    [
        (CLIP, FeatureRequest()),
        (CLIP, FeatureRequest(layers=(-1, 1), cls=True)),
        (SIGLIP, FeatureRequest()),
    ],
)
def test_it_holds_what_the_encoder_gives_bit_for_bit(
    config: dict[str, Any],
    request_: FeatureRequest,
    shard: int,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_module, "SHARD", shard)
    tower = encoder(config)
    cache = opened(images, tmp_path / "cache", tower, request_)
    chosen = [images[index] for index in (7, 0, 19, 12)]
    with torch.no_grad():
        expected = tower.encode(torch.stack([to_pixels(path) for path in chosen]), request_)
    for found, direct in zip(cache.batch(chosen), expected, strict=True):
        assert torch.equal(found.values, direct.values)
        assert found.grids == direct.grids
        assert (found.cls is None) == (direct.cls is None)
        if found.cls is not None and direct.cls is not None:
            assert torch.equal(found.cls, direct.cls)


def no_encoding(*arguments: Any) -> Any:
    raise AssertionError("features are computed again")


def test_nothing_is_computed_twice(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(images, tmp_path / "cache", request=FeatureRequest())
    monkeypatch.setattr(VisionEncoder, "encode", no_encoding)
    copies = [path.rename(path.with_stem(f"{path.stem} copy")) for path in reversed(images)]
    again = opened(copies, tmp_path / "cache", request=FeatureRequest(cls=True))  # other names and order, CLS too
    for old, new in zip(images, reversed(copies), strict=True):
        first._content[old] = again._content[new]
        assert torch.equal(again.batch([new])[0].values, first.batch([old])[0].values)
    assert again.batch(copies)[0].cls is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda images, folder: opened(images, folder, encoder(seed=1)),
        lambda images, folder: opened(images, folder, encoder({**CLIP, "hidden_act": "relu"})),
        lambda images, folder: opened(images, folder, encoder(layer=-1)),
        lambda images, folder: opened(images, folder, encoder(SIGLIP)),
        lambda images, folder: opened(images[1:-1], folder),
        lambda images, folder: FeatureCache(encoder(), images, to_pixels, {"mode": "square"}, FeatureRequest(), folder),
    ],
    ids=["weights", "configuration", "layer", "tower", "images", "preprocessing"],
)
def test_whatever_decides_the_features_names_them(
    change: Callable[[list[Path], Path], FeatureCache], images: list[Path], tmp_path: Path
) -> None:
    opened(images, tmp_path / "cache")
    change(images, tmp_path / "cache")
    assert len([place for place in (tmp_path / "cache").iterdir() if place.suffix != ".lock"]) == 2


def test_an_image_of_the_same_name_is_another_one(images: list[Path], tmp_path: Path) -> None:
    before = opened(images, tmp_path / "cache").batch(images[:1])[0].values
    images[3].replace(images[0])
    images = [images[0], *images[4:]]
    assert not torch.equal(opened(images, tmp_path / "cache").batch(images[:1])[0].values, before)


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_damaged_shard_is_computed_again(
    kept: float, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = opened(images, tmp_path / "cache").batch(images)[0].values
    (shard,) = (tmp_path / "cache").glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[: int(kept * shard.stat().st_size)])
    assert torch.equal(opened(images, tmp_path / "cache").batch(images)[0].values, expected)
    assert "does not match its hash; computing it again" in capsys.readouterr().err


def test_of_two_at_once_one_computes(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = VisionEncoder.encode, []

    def counted(*arguments: Any) -> Any:
        calls.append(threading.get_ident())
        return encode(*arguments)

    monkeypatch.setattr(VisionEncoder, "encode", counted)
    towers = [encoder(), encoder()]
    found: list[Tensor] = []

    def read(tower: VisionEncoder) -> None:
        found.append(opened(images, tmp_path / "cache", tower).batch(images)[0].values)

    threads = [threading.Thread(target=read, args=(tower,)) for tower in towers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(calls)) == 1
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_run_is_an_uncached_one(dtype: str, tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    write_data(folder)
    losses = []
    for cache in (None, tmp_path / "cache"):
        run = build.resolve(parse(RunConfig, {**run_values(folder), "dtype": dtype}))
        model, processor = new_model(run)
        losses.append(train(model, processor, run, tmp_path / f"out-{cache is None}", cache).final_loss)
    assert losses[0] == losses[1]
