"""Finding the patch of the histology image that belongs to each spot."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata
from scllm._log import log, warn
from scllm._names import listed
from scllm._results import free_key, record, record_name
from scllm._typing import FloatArray, IntArray
from scllm.data.opened import closes_files
from scllm.data.patches import Placed, find_image
from scllm.data.spots import each_section, sections_of, spot_pitch, spot_positions

__all__ = ["image_patches"]

Image = str | PathLike[str]


@closes_files
def image_patches(
    adata: AnnData,
    *,
    image: Image | Mapping[str, Image] | None = None,
    library_key: str | None = None,
    size: float | None = None,
    pixels: int = 112,
    key_added: str = _keys.PATCHES,
    copy: bool = False,
) -> AnnData | None:
    """Find the square patch of the histology image around each spot.

    Only positions are written. The pixels are read from the image in windows when a function needs them, so images that
    do not fit into memory can be used. Tiled TIFF (also pyramids, OME-TIFF and slide formats) and OME-Zarr are read in
    windows; JPEG and PNG are decoded once as a whole, and may have up to ``scllm.settings.max_image_pixels`` pixels.

    Parameters
    ----------
    adata
        Spots by genes. ``obsm["spatial"]`` holds x and y of each spot in pixels of the full-size image.
    image
        Image file, zarr folder (OME-Zarr, or an image of a SpatialData folder), or a mapping of sections to these.
        ``None``: the full-size image that ``uns["spatial"]`` names, if that file exists, and otherwise its ``"hires"``
        or ``"lowres"`` image, which has fewer pixels per spot.
    library_key
        Column of ``obs`` that names the section of each spot. ``None``: the column whose values are the keys of
        ``uns["spatial"]``, or one section if it has at most one key.
    size
        Edge of a patch: in micrometres if the scale of the image is known (``scalefactors["microns_per_pixel"]`` in
        ``uns["spatial"]``, or the metadata of a TIFF or OME-Zarr), and otherwise in pixels of the full-size image. A
        log line says which. ``None``: the distance between neighbouring spots, so that patches do not overlap.
    pixels
        Edge of a patch in pixels after resizing.
    key_added
        Key of ``obsm`` to write.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.obsm[key_added]``
        Left, top, right and bottom edge of each patch in pixels of the full-size image, ``(n_spots, 4)`` int32.
    ``adata.uns["scllm"]["image_patches"]``
        ``params``, and a ``table`` with one row per section: the image, its scale, and how many patches lie ``outside``
        or ``partly_outside`` the image. What is outside is white.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=1, side=10)
    >>> scllm.pp.image_patches(adata)
    >>> adata.obsm["patches"].shape
    (100, 4)
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "obsm", key_added)
    if pixels < 1 or (size is not None and not size > 0):
        raise ValueError(f"Expected pixels and size above 0, got pixels={pixels} and size={size}. Pass larger values.")
    libraries = adata.uns.get(_keys.SPATIAL, {})
    section = sections_of(adata.obs, libraries, library_key)
    xy = spot_positions(adata.obsm, adata.obs_names)
    given = _images(image, section)
    boxes, rows = np.empty((adata.n_obs, 4), np.int32), []
    for name, spots in each_section(section):
        placed = find_image(given.get(name), libraries.get(name), name)
        edge = _edge(size, placed, xy[spots], name)
        boxes[spots] = _boxes(xy[spots], edge)
        rows.append({"section": name, **_described(placed, edge, boxes[spots])})
    table = pd.DataFrame(rows)
    _check_inside(table)

    adata = adata.copy() if copy else adata
    adata.obsm[key] = boxes
    params = {"size": size, "pixels": pixels, "library_key": library_key, "key_added": key}
    record_name(adata, "obsm", key_added)
    record(adata, "image_patches", params, table)
    return adata if copy else None


def _images(image: Image | Mapping[str, Image] | None, section: pd.Series) -> dict[str, Path]:
    """Return the image of each section that was passed."""
    names = list(dict.fromkeys(section))
    if image is None:
        return {}
    if not isinstance(image, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"Expected an image for each of {len(names)} sections ({listed(names)}), got one. Pass a mapping such "
                f"as image={{{names[0]!r}: 'he.tif', ...}}."
            )
        return {names[0]: Path(image)}
    missing = [name for name in names if name not in image]
    if missing:
        raise ValueError(f"Expected an image for each section, but image= has none for {listed(missing)}. Add them.")
    return {name: Path(image[name]) for name in names}


def _edge(size: float | None, placed: Placed, xy: FloatArray, name: str) -> float:
    """Return the edge of a patch in pixels of the full-size image."""
    if size is None:
        edge = spot_pitch(xy)
        if not edge > 0:
            raise ValueError(
                f"Expected section {name!r} to have spots at different positions, from whose distance the size of "
                f"patches follows, got {len(xy)} at one place. Pass size=."
            )
        return edge
    if placed.microns_per_pixel is None:
        log.info("taking size=%g as pixels, because the scale of the image of section %r is not known", size, name)
        return size
    log.info("taking size=%g as micrometres: %.4g µm per pixel in section %r", size, placed.microns_per_pixel, name)
    return size / placed.microns_per_pixel


def _boxes(xy: FloatArray, edge: float) -> IntArray:
    edge = max(1, round(edge))
    corner = np.rint(xy - edge / 2).astype(np.int32)
    return np.hstack([corner, corner + edge])


def _described(placed: Placed, edge: float, boxes: IntArray) -> dict[str, Any]:
    """Describe the image of a section and how its patches lie in it."""
    height, width = placed.slide.size
    left, top, right, bottom = (boxes * placed.scale).T
    outside = (right <= 0) | (bottom <= 0) | (left >= width) | (top >= height)
    partly = ~outside & ((left < 0) | (top < 0) | (right > width) | (bottom > height))
    return {
        "image": placed.where,
        "width": width,
        "height": height,
        "scale": placed.scale,
        "microns_per_pixel": np.nan if placed.microns_per_pixel is None else placed.microns_per_pixel,
        "edge": edge,
        "n_spots": len(boxes),
        "outside": int(outside.sum()),
        "partly_outside": int(partly.sum()),
    }


def _check_inside(table: pd.DataFrame) -> None:
    """Raise if half of a section's patches are outside its image; warn if some are."""
    for row in table.itertuples():
        if 2 * row.outside > row.n_spots:
            raise ValueError(
                f"Expected the spots of section {row.section!r} to lie within its image of {row.width} x {row.height} "
                f"px, but {row.outside} of {row.n_spots} patches lie outside. obsm['spatial'] must hold x and y in "
                "pixels of the full-size image, in this order: check the order, the scale factor and the image."
            )
    outside, partly = int(table["outside"].sum()), int(table["partly_outside"].sum())
    if outside or partly:
        warn(
            f"{outside} of {int(table['n_spots'].sum())} patches lie outside the image and {partly} partly outside. "
            "What is outside will be white. Remove those spots if that is not what you want."
        )
