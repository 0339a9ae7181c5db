"""The feature cache: what an uncached run would compute, once, for everybody, and never what nobody computed."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import run_values, write_data, write_models
from tests.tiny import CLIP, SIGLIP
from vlmzoo import build, files
from vlmzoo.config import EncoderConfig, Features, RunConfig, parse
from vlmzoo.connector import FeatureMap, FeatureRequest
from vlmzoo.files import sha256
from vlmzoo.sweeps.trial import new_model
from vlmzoo.training.run import train
from vlmzoo.vision import cache as cache_module
from vlmzoo.vision.cache import FeatureCache
from vlmzoo.vision.encoder import VisionEncoder
from vlmzoo.vision.shards import DamageError


def encoder(config: dict[str, Any] = CLIP, seed: int = 0, layer: int = -2) -> VisionEncoder:
    return VisionEncoder(build.vision(EncoderConfig(config=config), seed=seed), layer=layer).eval()


def pixels_of(paths: Sequence[Path]) -> Tensor:
    pixels = [torch.from_numpy(np.array(Image.open(path), dtype=np.float32)) for path in paths]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 255


def to_pixels(groups: Iterable[Sequence[Path]]) -> Iterator[Tensor]:
    return map(pixels_of, groups)


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
    images: list[Path],
    folder: Path,
    tower: VisionEncoder | None = None,
    request: FeatureRequest | None = None,
    features: Features = "compute",
) -> FeatureCache:
    request = request or FeatureRequest()
    return FeatureCache(tower or encoder(), images, to_pixels, {"mode": "pad"}, request, folder, features)


def batch(cache: FeatureCache, images: list[Path]) -> list[FeatureMap]:
    return [stored.on("cpu") for stored in cache.read(images)]


def values(cache: FeatureCache, images: list[Path]) -> Tensor:
    return batch(cache, images)[0].values


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/[0-9]*.safetensors"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files for the nineteen different pictures."""
    monkeypatch.setattr(cache_module, "SHARD", 8)


@pytest.mark.parametrize("shard", [1024, 8])
@pytest.mark.parametrize(
    ("config", "request_"),
    [
        (CLIP, FeatureRequest()),
        (CLIP, FeatureRequest(layers=(-1, 1, -1), cls=True)),
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
    assert cache.error is None
    chosen = [images[index] for index in (7, 0, 19, 12)]
    with torch.no_grad():
        expected = tower.encode(pixels_of(chosen), request_)
    for found, direct in zip(batch(cache, chosen), expected, strict=True):
        assert torch.equal(found.values, direct.values)
        assert found.grids == direct.grids
        assert (found.cls is None) == (direct.cls is None)
        if found.cls is not None and direct.cls is not None:
            assert torch.equal(found.cls, direct.cls)


def test_attention_of_cls_is_held_bit_for_bit(images: list[Path], tmp_path: Path) -> None:
    tower, request = encoder(), FeatureRequest(cls_attention=True)
    tower.model.set_attn_implementation("eager")
    (found,) = batch(opened(images, tmp_path / "cache", tower, request), images)
    with torch.no_grad():
        (direct,) = tower.encode(pixels_of(images), request)
    assert found.cls_attention is not None
    assert direct.cls_attention is not None
    assert torch.equal(found.cls_attention, direct.cls_attention)


@pytest.mark.parametrize(("features", "largest"), [("bfloat16", 0.003), ("float8", 0.04)])
def test_narrower_features_show_their_error(
    features: Features,
    largest: float,
    images: list[Path],
    tmp_path: Path,
    small: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An outlying channel, as CLIP has them, takes nothing from the others."""
    tower = encoder()
    tower.model.embeddings.patch_embedding.weight.data[3] *= 100  # pyright: ignore
    different = images[:-1]
    with torch.no_grad():
        exact = tower.encode(pixels_of(different), FeatureRequest())[0].values
    cache = opened(images, tmp_path / "cache", tower, features=features)
    found = values(cache, different)
    assert found.dtype == exact.dtype
    assert cache.error == pytest.approx(((found - exact).norm() / exact.norm()).item(), rel=1e-4)
    others = [channel for channel in range(exact.shape[-1]) if channel != 3]
    assert (found - exact)[..., others].norm() <= largest * exact[..., others].norm()
    assert f"in {features}, relative error {100 * cache.error:.3g} %" in capsys.readouterr().err
    assert opened(images, tmp_path / "cache", tower, features=features).error == cache.error
    assert capsys.readouterr().err == ""


def test_bfloat16_of_a_bfloat16_encoder_is_no_other_cache(images: list[Path], tmp_path: Path) -> None:
    tower = VisionEncoder(build.vision(EncoderConfig(config=CLIP), dtype=torch.bfloat16), layer=-2).eval()
    for features in ("compute", "bfloat16"):
        assert opened(images, tmp_path / "cache", tower, features=features).error is None
    assert len(shards(tmp_path / "cache")) == 1


def test_others_read_the_files_as_safetensors(images: list[Path], tmp_path: Path) -> None:
    tower = encoder()
    for features in ("compute", "float8"):
        opened(images, tmp_path / features, tower, features=features)
        (file,) = shards(tmp_path / features)
        found = load_file(file)
        read = found["values"].float() * found.get("scale", torch.ones(()))
        with torch.no_grad():
            exact = tower.encode(pixels_of(images), FeatureRequest())[0].values
        assert len(read) == 19
        torch.testing.assert_close(read.sum(), exact[:-1].sum(), rtol=0.05, atol=0.05 * float(exact.abs().sum()))


def no_encoding(*arguments: Any) -> Any:
    raise AssertionError("features are computed again")


def test_nothing_is_computed_twice(images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(images, tmp_path / "cache")
    before = values(first, images)
    monkeypatch.setattr(VisionEncoder, "encode", no_encoding)
    copies = [path.rename(path.with_stem(f"{path.stem} copy")) for path in images]
    again = opened(copies[::-1], tmp_path / "cache", request=FeatureRequest(cls=True))  # names, order and CLS differ
    assert torch.equal(values(again, copies), before)
    assert batch(again, copies)[0].cls is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda images, folder: opened(images, folder, encoder(seed=1)),
        lambda images, folder: opened(images, folder, encoder({**CLIP, "hidden_act": "relu"})),
        lambda images, folder: opened(images, folder, encoder(layer=-1)),
        lambda images, folder: opened(images, folder, encoder(SIGLIP)),
        lambda images, folder: opened(images[1:-1], folder),
        lambda images, folder: opened(images, folder, features="bfloat16"),
        lambda images, folder: FeatureCache(encoder(), images, to_pixels, {"mode": "square"}, FeatureRequest(), folder),
    ],
    ids=["weights", "configuration", "layer", "tower", "images", "type", "preprocessing"],
)
def test_whatever_decides_the_features_names_them(
    change: Callable[[list[Path], Path], FeatureCache], images: list[Path], tmp_path: Path
) -> None:
    opened(images, tmp_path / "cache")
    change(images, tmp_path / "cache")
    assert len(shards(tmp_path / "cache")) == 2


def test_an_image_of_the_same_name_is_another_one(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its size and the time of its change were made those of the image before it."""
    monkeypatch.setattr(files, "SETTLED", 0)
    before, stat = values(opened(images, tmp_path / "cache"), images[:1]), images[0].stat()
    Image.new("RGB", (24, 24)).save(images[0])
    images[0].write_bytes(images[0].read_bytes().ljust(stat.st_size, b"\0"))
    os.utime(images[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert images[0].stat().st_size == stat.st_size
    assert not torch.equal(values(opened(images, tmp_path / "cache"), images[:1]), before)


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.001, 0.0])
def test_a_file_that_is_cut_off_is_computed_again(
    kept: float, images: list[Path], tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = values(opened(images, tmp_path / "cache"), images)
    file = shards(tmp_path / "cache")[1]
    others = [shard.stat() for shard in shards(tmp_path / "cache") if shard != file]
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    assert torch.equal(values(opened(images, tmp_path / "cache"), images), expected)
    said = capsys.readouterr().err
    assert said.startswith(f"feature cache: {file}: damaged (")
    assert said.endswith("; computing it again\n")
    assert said.count("\n") == 1
    assert [shard.stat() for shard in shards(tmp_path / "cache") if shard != file] == others


def test_a_flipped_bit_anywhere_is_found(images: list[Path], tmp_path: Path, small: None) -> None:
    """Of header, checksums and values: what is read is right or an error, and the next cache is right."""
    tower = encoder()
    expected = values(opened(images, tmp_path / "cache", tower), images)
    file = shards(tmp_path / "cache")[1]
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    found: list[str] = []
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(16), *rng.integers(16, header, 20), *rng.integers(header, len(whole), 20)]
    for place in map(int, places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            assert torch.equal(values(opened(images, tmp_path / "cache", tower), images), expected)
        except DamageError as error:
            found.append(str(error))
            assert not file.exists()
            assert torch.equal(values(opened(images, tmp_path / "cache", tower), images), expected)
    message = re.compile(rf"{file}: row \d+ of 'values' does not match its checksum \(image .*\); remove the file .*")
    assert len(found) > 12
    assert all(message.fullmatch(error) for error in found)


def test_rows_are_not_taken_for_one_another(images: list[Path], tmp_path: Path) -> None:
    expected = opened(images, tmp_path / "cache")
    (file,) = shards(tmp_path / "cache")
    tensors = load_file(file)
    size = tensors["values"][0].nbytes
    whole = bytearray(file.read_bytes())
    first, second = (whole.index(tensors["values"][row].numpy().tobytes()) for row in (0, 1))
    whole[first : first + size], whole[second : second + size] = (
        whole[second : second + size],
        whole[first : first + size],
    )
    file.write_bytes(whole)
    with pytest.raises(DamageError, match="does not match its checksum"):
        expected.read(images)


def test_threads_compute_each_file_once(images: list[Path], tmp_path: Path, small: None) -> None:
    computed: list[Path] = []

    def pixels(groups: Iterable[Sequence[Path]]) -> Iterator[Tensor]:
        for group in groups:
            computed.extend(group)
            yield pixels_of(group)

    found: list[Tensor] = []

    def read(tower: VisionEncoder) -> None:
        cache = FeatureCache(tower, images, pixels, {}, FeatureRequest(), tmp_path / "cache")
        found.append(values(cache, images))

    threads = [threading.Thread(target=read, args=(tower,)) for tower in [encoder() for _ in range(3)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == len(set(computed)) == 19
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_another_takes_over_what_a_killed_process_left(
    images: list[Path], tmp_path: Path, small: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """One stands still within the first file, until another has computed all others and waits for it; then it dies."""
    at_work, waiting = multiprocessing.get_context("fork").Pipe()
    child = os.fork()
    if child == 0:

        def stands_still(groups: Iterable[Sequence[Path]]) -> Iterator[Tensor]:
            at_work.send("locked")
            signal.pause()
            yield torch.empty(0)

        with suppress(BaseException):
            FeatureCache(encoder(), images, stands_still, {"mode": "pad"}, FeatureRequest(), tmp_path / "cache")
        os._exit(1)
    assert waiting.poll(60)
    computed = []

    def pixels(groups: Iterable[Sequence[Path]]) -> Iterator[Tensor]:
        for group in groups:
            computed.append(group)
            if len(computed) == 2:  # the last but one: the child's is left
                os.kill(child, signal.SIGKILL)
            yield pixels_of(group)

    cache = FeatureCache(encoder(), images, pixels, {"mode": "pad"}, FeatureRequest(), tmp_path / "cache")
    os.waitpid(child, 0)
    assert [len(group) for group in computed] == [8, 3, 8]
    assert torch.equal(values(cache, images), values(opened(images, tmp_path / "other"), images))


def test_it_goes_on_with_the_files_that_are_there(images: list[Path], tmp_path: Path, small: None) -> None:
    def stops(groups: Iterable[Sequence[Path]]) -> Iterator[Tensor]:
        if shards(tmp_path / "cache"):
            raise KeyboardInterrupt
        return to_pixels(groups)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(encoder(), images, stops, {"mode": "pad"}, FeatureRequest(), tmp_path / "cache")
    (there,) = shards(tmp_path / "cache")
    before = there.stat()
    opened(images, tmp_path / "cache")
    assert len(shards(tmp_path / "cache")) == 3
    assert there.stat() == before


def test_a_full_disk_loses_nothing(
    images: list[Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(synced) == 4:  # the file of hashes and its folder, the first shard and its folder, then the second
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*00001.safetensors"):
        opened(images, tmp_path / "cache")
    (there,) = shards(tmp_path / "cache")
    assert [path.name for path in there.parent.iterdir() if path.suffix != ".lock"] == [there.name]
    before = there.stat()
    monkeypatch.setattr("os.fsync", real)
    assert torch.equal(
        values(opened(images, tmp_path / "cache"), images), values(opened(images, tmp_path / "other"), images)
    )
    assert there.stat() == before


def test_images_that_stay_are_not_read_again(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they are older than a clock's step; and a broken index costs time alone."""
    monkeypatch.setattr(files, "SETTLED", 0)
    read: list[Path] = []
    monkeypatch.setattr(files, "sha256", lambda file: read.append(file) or sha256(file))
    first = files.content_hashes(images, tmp_path / "index")
    assert sorted(read) == sorted(images)
    assert first[images[0]] == sha256(images[0]) == first[images[-1]]
    read.clear()
    assert files.content_hashes(images, tmp_path / "index") == first
    assert read == []
    os.utime(images[4])
    assert files.content_hashes(images, tmp_path / "index") == first
    assert read == [images[4]]
    for broken in ("{", "[]", '{"a": 1}'):
        next((tmp_path / "index").iterdir()).write_text(broken)
        assert files.content_hashes(images, tmp_path / "index") == first
    read.clear()
    monkeypatch.setattr(files, "SETTLED", 10**12)
    os.utime(images[4])
    for _ in range(2):
        assert files.content_hashes(images, tmp_path / "index") == first
    assert read == [images[4], *images]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_run_is_an_uncached_one(
    dtype: str, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_models(tmp_path)
    write_data(folder)
    losses = []
    for cache in (None, tmp_path / "cache"):
        run = build.resolve(parse(RunConfig, {**run_values(folder), "dtype": dtype}))
        model, processor = new_model(run)
        losses.append(train(model, processor, run, tmp_path / f"out-{cache is None}", cache).final_loss)
    assert losses[0] == losses[1]
    assert len(shards(tmp_path / "cache" / "features")) > 2
