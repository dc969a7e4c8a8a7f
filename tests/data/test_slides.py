"""Images that are read in windows."""

from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
import zarr
from messages import naming
from PIL import Image

from scllm import settings
from scllm.data.opened import files_closed
from scllm.data.slides import open_slide, slide_of_array


@pytest.fixture(autouse=True)
def _files_are_closed():
    with files_closed():
        yield


@pytest.fixture
def picture() -> np.ndarray:
    y, x = np.mgrid[:90, :120]
    return np.stack([2 * y, 2 * x, 100 + y // 2 + x // 3], axis=-1).astype(np.uint8)


def ome_zarr(path, picture) -> None:
    group = zarr.create_group(str(path))
    group.create_array("0", data=np.moveaxis(picture, -1, 0), chunks=(3, 32, 32))
    group.create_array("1", data=np.moveaxis(picture[::2, ::2], -1, 0), chunks=(3, 32, 32))
    steps = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    axes = [{"name": "c"}, *({"name": name, "unit": "micrometer"} for name in "yx")]
    datasets = [{"path": "0", "coordinateTransformations": steps}, {"path": "1"}]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": datasets}]}


@pytest.mark.parametrize("kind", ["png", "tif", "tiled.tif", "planes.tif", "zarr", "array"])
def test_every_format_gives_the_same_window(tmp_path, picture, kind):
    path = tmp_path / f"he.{kind}"
    match kind:
        case "png":
            Image.fromarray(picture).save(path)
        case "tif":
            tifffile.imwrite(path, picture, photometric="rgb")
        case "tiled.tif":
            tifffile.imwrite(
                path, picture, photometric="rgb", tile=(32, 32), compression="jpeg", compressionargs={"level": 100}
            )
        case "planes.tif":
            tifffile.imwrite(path, np.moveaxis(picture, -1, 0), photometric="rgb", planarconfig="separate")
        case "zarr":
            ome_zarr(path, picture)
    slide = slide_of_array(picture, "uns") if kind == "array" else open_slide(path)
    assert slide.size == (90, 120)
    window = slide.patch((10, 20, 42, 52), 32)
    expected = picture[20:52, 10:42].astype(int)
    # only JPEG loses something
    assert np.abs(window - expected).mean() <= (2 if kind == "tiled.tif" else 0)


def test_a_photograph_is_decoded_once(tmp_path, picture, caplog):
    Image.fromarray(picture).save(tmp_path / "he.jpg", quality=100)
    slide = open_slide(tmp_path / "he.jpg")
    assert "decoding" not in caplog.text
    for corner in (0, 10, 20):
        slide.patch((corner, corner, corner + 32, corner + 32), 32)
    assert caplog.text.count("decoding he.jpg, 120 x 90 px, once as a whole") == 1


def test_what_is_outside_is_white(picture):
    patch = slide_of_array(picture, "uns").patch((-8, 80, 8, 96), 16)
    assert (patch[:, :8] == 255).all()
    assert (patch[10:] == 255).all()
    assert (patch[:10, 8:] == picture[80:90, :8]).all()


def test_a_smaller_level_is_read_if_it_has_enough_pixels(tmp_path):
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[:, None, None], 128, 1).repeat(3, 2)
    path = tmp_path / "pyramid.ome.tif"
    with tifffile.TiffWriter(path) as writer:
        options = {"photometric": "rgb", "tile": (32, 32)}
        writer.write(ramp, subifds=1, **options)
        writer.write(255 - ramp[::2, ::2], subfiletype=1, **options)  # inverted, to see which level was read
    slide = open_slide(path)
    assert slide.patch((0, 0, 64, 64), 64)[0, 0, 0] == 0
    assert slide.patch((0, 0, 64, 64), 32)[0, 0, 0] == 255


BIG, TILE = 20_000, 512
READ = """
import resource, sys
from pathlib import Path
from scllm.data.slides import open_slide
slide = open_slide(Path(sys.argv[1]))
open_slide(Path(sys.argv[1])).patch((0, 0, 224, 224), 224)  # imports what reads the format
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corners = [(x, y) for x in (0, 9_000, 19_700) for y in (0, 19_700)]
patches = [slide.patch((x, y, x + 224, y + 224), pixels) for x, y in corners for pixels in (112, 224)]
print(slide.size, len(slide.levels), {int(value) for patch in patches for value in (patch.min(), patch.max())})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def big_tiff(path) -> None:
    """A pyramid of compressed tiles: 200 everywhere in the full image, 100 in the smaller one."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level, edge in enumerate((BIG, BIG // 2)):
            encoded = zlib.compress(np.full((TILE, TILE, 3), 200 - 100 * level, np.uint8).tobytes())
            writer.write(
                (encoded for _ in range((-(-edge // TILE)) ** 2)),
                shape=(edge, edge, 3),
                dtype=np.uint8,
                photometric="rgb",
                tile=(TILE, TILE),
                compression="zlib",
                **({"subifds": 1} if level == 0 else {"subfiletype": 1}),
            )


def big_zarr(path) -> None:
    """The same as OME-Zarr: chunks that are not written hold the fill value, and those that are read are written."""
    group = zarr.create_group(str(path))
    for level, edge in enumerate((BIG, BIG // 2)):
        array = group.create_array(
            str(level), shape=(3, edge, edge), dtype=np.uint8, chunks=(3, TILE, TILE), fill_value=7
        )
        for x in (0, 9_000, 19_700):
            for y in (0, 19_700):
                place = [slice(at // (level + 1), at // (level + 1) + 224) for at in (y, x)]
                array[:, *place] = 200 - 100 * level
    group.attrs["ome"] = {"multiscales": [{"axes": [], "datasets": [{"path": "0"}, {"path": "1"}]}]}


@pytest.mark.parametrize(("name", "write"), [("he.ome.tif", big_tiff), ("he.zarr", big_zarr)])
def test_windows_of_a_big_pyramid_take_little_memory(tmp_path, name, write):
    write(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    seen, peak = done.stdout.splitlines()
    # patches of 112 px are read from the smaller level, those of 224 px from the full image
    assert seen == "(20000, 20000) 2 {200, 100}"
    # the whole image has 1.2 GB; kilobytes
    assert int(peak) < 50_000


def test_the_scale_is_read_from_the_file(tmp_path, picture):
    tifffile.imwrite(tmp_path / "cm.tif", picture, photometric="rgb", resolution=(20_000, 20_000), resolutionunit=3)
    tifffile.imwrite(tmp_path / "inch.tif", picture, photometric="rgb", resolution=(72, 72), resolutionunit=2)
    ome_zarr(tmp_path / "he.zarr", picture)
    assert open_slide(tmp_path / "cm.tif").microns_per_pixel == pytest.approx(0.5)
    assert open_slide(tmp_path / "inch.tif").microns_per_pixel is None
    assert open_slide(tmp_path / "he.zarr").microns_per_pixel == pytest.approx(0.5)


def test_a_spatialdata_folder_with_one_image_is_opened(tmp_path, picture):
    (tmp_path / "data.zarr" / "images").mkdir(parents=True)
    ome_zarr(tmp_path / "data.zarr" / "images" / "he", picture)
    assert open_slide(tmp_path / "data.zarr").size == (90, 120)
    ome_zarr(tmp_path / "data.zarr" / "images" / "other", picture)
    with pytest.raises(ValueError, match=naming(2, "images/he")):
        open_slide(tmp_path / "data.zarr")


def test_the_limit_of_pixels_is_a_setting(tmp_path, picture, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "he.png")
    monkeypatch.setattr(settings, "max_image_pixels", 10_000)
    with pytest.raises(ValueError, match=naming("10,000", "10,800", "max_image_pixels", "tiled TIFF")):
        open_slide(tmp_path / "he.png")


@pytest.mark.parametrize("name", ["he.jpg", "he.png", "he.tif"])
def test_a_damaged_image_is_named(tmp_path, picture, name):
    path = tmp_path / name
    tifffile.imwrite(path, picture) if name == "he.tif" else Image.fromarray(picture).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: 8 if name == "he.tif" else len(content) // 2])
    with pytest.raises(ValueError, match=naming(name, "cannot be read")):
        open_slide(path).patch((0, 0, 90, 90), 90)


def test_other_files_and_folders_are_named(tmp_path):
    (tmp_path / "he.txt").write_text("")
    zarr.create_group(str(tmp_path / "table.zarr"))
    with pytest.raises(ValueError, match=naming("he.txt", ".tif", ".png")):
        open_slide(tmp_path / "he.txt")
    with pytest.raises(ValueError, match=naming("table.zarr", "multiscales")):
        open_slide(tmp_path / "table.zarr")
    with pytest.raises(FileNotFoundError, match=naming("gone.tif")):
        open_slide(tmp_path / "gone.tif")
