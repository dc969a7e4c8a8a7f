"""Images of tissue sections, read in windows: TIFF and zarr from disk, JPEG and PNG decoded once, arrays in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm import settings
from scllm._log import log
from scllm.data.opened import opened
from scllm.data.run_files import read_json

__all__ = ["Slide", "open_slide", "slide_of_array"]

_TIFF = (".tif", ".tiff", ".svs", ".ndpi", ".btf", ".qptiff", ".scn")
_RASTER = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# width of a pixel that a slide scanner may have, in micrometres; others are resolutions of screens and printers
_PIXEL_WIDTHS = (0.05, 50.0)
_WHITE = 255


@dataclass
class Slide:
    """An image of which only windows are read.

    Parameters
    ----------
    name
        Its path, or where it is stored.
    levels
        The image and smaller versions of it, arrays ``(h, w, c)`` or, with ``channels_first``, ``(c, h, w)``.
    microns_per_pixel
        Width of a pixel of the first level in micrometres; ``None`` if the file does not tell.
    file
        The open file, if there is one.
    """

    name: str
    levels: Sequence[Any]
    channels_first: bool = False
    microns_per_pixel: float | None = None
    file: Any = None

    def close(self) -> None:
        """Close the file; a verb closes it when it ends."""
        if self.file is not None:
            self.file.close()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._size(self.levels[0])

    def _size(self, level: Any) -> tuple[int, int]:
        shape = level.shape
        return (shape[-2], shape[-1]) if self.channels_first and len(shape) == 3 else (shape[0], shape[1])

    def patch(self, box: Sequence[float], pixels: int) -> NDArray[np.uint8]:
        """Read the square ``(x0, y0, x1, y1)`` as ``(pixels, pixels, 3)``; what is outside the image is white.

        The smallest level that still has enough pixels is read.
        """
        from PIL import Image

        height = self.size[0]
        fitting = [lv for lv in self.levels if (box[3] - box[1]) * self._size(lv)[0] / height >= pixels]
        level = fitting[-1] if fitting else self.levels[0]
        scale = self._size(level)[0] / height
        x0, y0, x1, y1 = (round(edge * scale) for edge in box)
        window = self._window(level, y0, max(y1, y0 + 1), x0, max(x1, x0 + 1))
        return np.asarray(Image.fromarray(window).resize((pixels, pixels), Image.Resampling.BILINEAR))

    def _window(self, level: Any, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        height, width = self._size(level)
        full = np.full((y1 - y0, x1 - x0, 3), _WHITE, np.uint8)
        top, bottom, left, right = max(y0, 0), min(y1, height), max(x0, 0), min(x1, width)
        if top >= bottom or left >= right:
            return full
        try:
            if self.channels_first and len(level.shape) == 3:
                read = np.moveaxis(np.asarray(level[:, top:bottom, left:right]), 0, -1)
            else:
                read = np.asarray(level[top:bottom, left:right])
        except (OSError, ValueError, RuntimeError, SyntaxError) as error:
            raise _unreadable(self.name, error) from error
        full[top - y0 : bottom - y0, left - x0 : right - x0] = _as_rgb(read, self.name)
        return full


def slide_of_array(array: Any, name: str) -> Slide:
    """Use an array ``(h, w, 3)`` in memory, as in ``uns["spatial"]``: bytes, or values from 0 to 1."""
    array = np.asarray(array)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"Expected an image of shape (height, width, 3) in {name}, got {array.shape}. Replace it.")
    return Slide(name, [array])


def open_slide(path: Path) -> Slide:
    """Open an image file, or a folder in the OME-Zarr format, without reading its pixels."""
    if not path.exists():
        raise FileNotFoundError(f"Expected an image at {path}, but it does not exist. Check the path.")
    if path.is_dir():
        return _open_zarr(path)
    if path.suffix.lower() in _TIFF:
        return _open_tiff(path)
    if path.suffix.lower() in _RASTER:
        return _open_raster(path)
    raise ValueError(
        f"Expected an image in one of the formats {', '.join((*_TIFF, *_RASTER))} or a zarr folder, got {path}. "
        "Convert it to a tiled TIFF."
    )


class _Raster:
    """A JPEG or PNG, which is decoded as a whole the first time that a window of it is read."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self._pixels: NDArray[np.uint8] | None = None

    def __getitem__(self, window: Any) -> NDArray[np.uint8]:
        if self._pixels is None:
            height, width, _ = self.shape
            log.info("decoding %s, %d x %d px, once as a whole", self.path.name, width, height)
            with _pillow_limit_off() as pillow, pillow.open(self.path) as image:
                self._pixels = np.asarray(image.convert("RGB"))
        return self._pixels[window]


@contextmanager
def _pillow_limit_off() -> Iterator[Any]:
    """Pillow with its own limit of pixels off: ``settings.max_image_pixels`` is checked instead."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield Image
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _open_raster(path: Path) -> Slide:
    try:
        with _pillow_limit_off() as pillow, pillow.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(str(path), error) from error
    if width * height > settings.max_image_pixels:
        raise ValueError(
            f"Expected at most {settings.max_image_pixels:,} pixels in a {path.suffix} image, which is decoded as a "
            f"whole, got {width:,} x {height:,} = {width * height:,} in {path}. Convert it to a tiled TIFF, or raise "
            "scllm.settings.max_image_pixels if there is memory for three bytes a pixel."
        )
    return Slide(str(path), [_Raster(path, (height, width, 3))])


def _open_tiff(path: Path) -> Slide:
    try:
        import tifffile
        import zarr
    except ImportError as error:
        raise ImportError(
            f'Reading {path.name} needs tifffile. Install it with pip install "scllm-tools[spatial]".'
        ) from error
    try:
        file = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, OSError, ValueError) as error:
        raise _unreadable(str(path), error) from error
    opened(file)
    try:
        series = file.series[0]
        levels = [zarr.open_array(series.aszarr(level=n), mode="r") for n in range(len(series.levels))]
    except (tifffile.TiffFileError, OSError, ValueError, IndexError) as error:
        raise _unreadable(str(path), error) from error
    axes = series.axes
    if axes not in ("YX", "YXS", "SYX", "CYX"):
        raise ValueError(
            f"Expected a colour image in {path} (axes YXS or CYX), got axes {axes} of shape {series.shape}. Export the "
            "H&E image alone."
        )
    return Slide(str(path), levels, axes[0] in "SC", _tiff_scale(file), file)


def _tiff_scale(file: Any) -> float | None:
    """Read the width of a pixel from OME-XML, from the description of a scanner, or from the resolution per cm."""
    page = file.pages[0]
    text = f"{file.ome_metadata or ''} {page.description or ''}"
    found = re.search(r'PhysicalSizeX="([\d.eE+-]+)"', text) or re.search(r"\bMPP\s*=\s*([\d.]+)", text)
    if found and ("PhysicalSizeXUnit" not in text or re.search(r'PhysicalSizeXUnit="(µm|&#181;m|um)"', text)):
        return _plausible(float(found[1]))
    unit, resolution = page.tags.get("ResolutionUnit"), page.tags.get("XResolution")
    if unit is None or resolution is None or int(unit.value) != 3 or not resolution.value[0]:
        return None
    return _plausible(1e4 * resolution.value[1] / resolution.value[0])


def _plausible(width: float) -> float | None:
    return width if _PIXEL_WIDTHS[0] <= width <= _PIXEL_WIDTHS[1] else None


def _open_zarr(path: Path) -> Slide:
    """Open an OME-Zarr image, or a SpatialData folder that holds one."""
    import zarr

    images = sorted(one for one in (path / "images").iterdir() if one.is_dir()) if (path / "images").is_dir() else []
    if len(images) > 1:
        raise ValueError(
            f"Expected one image in {path}, got {len(images)}. Pass one of them, such as image='{images[0]}'."
        )
    path = images[0] if images else path
    try:
        opened = zarr.open(str(path), mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(str(path), error) from error
    if isinstance(opened, zarr.Array):
        levels, scale = [opened], None
    else:
        levels, scale = _ome_levels(opened, path)
    if levels[0].ndim not in (2, 3):
        raise ValueError(f"Expected an image of 2 or 3 axes in {path}, got shape {levels[0].shape}. Export one plane.")
    channels_first = levels[0].ndim == 3 and levels[0].shape[0] in (1, 3, 4) and levels[0].shape[2] not in (3, 4)
    return Slide(str(path), levels, channels_first, scale)


def _ome_levels(group: Any, path: Path) -> tuple[list[Any], float | None]:
    """Return the levels that the OME metadata list, largest first, and the width of a pixel if it is given."""
    attributes = dict(group.attrs)
    scales = dict(attributes.get("ome", attributes)).get("multiscales")
    if not scales:
        kind = path / "spec.json"
        seen = f"a run directory of {read_json(kind).get('verb')}" if kind.is_file() else "another kind of folder"
        raise ValueError(
            f"Expected an OME-Zarr image in {path}, with 'multiscales' in its attributes, got {seen}. Pass the folder "
            "of the image, such as 'data.zarr/images/he'."
        )
    parts, axes = scales[0]["datasets"], scales[0].get("axes", [])
    units = [axis.get("unit") for axis in axes if isinstance(axis, dict) and axis.get("name") == "x"]
    steps = [t["scale"][-1] for t in parts[0].get("coordinateTransformations", []) if t.get("type") == "scale"]
    scale = _plausible(float(steps[0])) if steps and units and units[0] == "micrometer" else None
    return [group[part["path"]] for part in parts], scale


def _as_rgb(read: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Convert what was read to three channels of bytes."""
    if read.ndim == 2:
        read = read[:, :, None]
    if read.shape[2] not in (1, 3, 4):
        raise ValueError(f"Expected 1, 3 or 4 channels in {name}, got {read.shape[2]}. Export the H&E image alone.")
    if read.dtype.kind == "f":
        read = np.clip(np.rint(read * _WHITE), 0, _WHITE)
    elif read.dtype == np.uint16:
        read = read // 257
    read = read.astype(np.uint8)
    return np.repeat(read, 3, axis=2) if read.shape[2] == 1 else read[:, :, :3]


def _unreadable(name: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"Expected a complete image in {name}, but it cannot be read ({reason}). Copy or export it again."
    )
