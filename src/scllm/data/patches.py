"""The image of a section, and the pixels of the patches that ``pp.image_patches`` found in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scllm._typing import IntArray
from scllm.data.slides import Slide, open_slide, slide_of_array

__all__ = ["PatchReader", "Placed", "find_image"]

_IMAGES = {"hires": "tissue_hires_scalef", "lowres": "tissue_lowres_scalef"}
# where tools note the path of the full-size image
_PATHS = ("source_image_path", "fullres_image_file")
_HELD = 4 << 30  # bytes of patches that are kept in memory


@dataclass(frozen=True)
class Placed:
    """The image of a section, and how positions of spots are scaled to its pixels."""

    slide: Slide
    where: str
    scale: float
    microns_per_pixel: float | None
    """Micrometres per pixel of the full-size image, to which the positions belong."""


def find_image(path: Path | None, library: Mapping[str, Any] | None, name: str) -> Placed:
    """Open the image of a section: the file that was passed, or one of the Visium layout in ``uns["spatial"]``."""
    known = _microns(library)
    path = _full_size(library) if path is None else path
    if path is not None:
        slide = open_slide(path)
        return Placed(slide, str(path.absolute()), 1.0, slide.microns_per_pixel if known is None else known)
    images = (library or {}).get("images", {})
    level = next((level for level in _IMAGES if level in images), None)
    if level is None:
        raise ValueError(
            f"Expected an image of section {name!r} in uns['spatial'][{name!r}]['images'] ('hires' or 'lowres'), but "
            "there is none. Pass image=."
        )
    factors = (library or {}).get("scalefactors", {})
    if _IMAGES[level] not in factors:
        raise ValueError(
            f"Expected the scale factor {_IMAGES[level]!r} of section {name!r} in uns['spatial'][{name!r}]"
            f"['scalefactors'], which holds {sorted(factors)}. Add it, or pass the full-size image as image=."
        )
    slide = slide_of_array(images[level], f"uns['spatial'][{name!r}]['images'][{level!r}]")
    return Placed(slide, level, float(factors[_IMAGES[level]]), known)


def _full_size(library: Mapping[str, Any] | None) -> Path | None:
    metadata = (library or {}).get("metadata", {})
    paths = (Path(str(metadata[name])) for name in _PATHS if metadata.get(name))
    return next((path for path in paths if path.exists()), None)


def _microns(library: Mapping[str, Any] | None) -> float | None:
    value = (library or {}).get("scalefactors", {}).get("microns_per_pixel")
    return None if value is None else float(value)


@dataclass
class PatchReader:
    """Reads the pixels of patches.

    Parameters
    ----------
    boxes
        Edges of patches in pixels of the full-size image, ``(n, 4)``.
    section
        Section of each patch.
    table
        Table of ``pp.image_patches``: image and scale of each section.
    libraries
        ``uns["spatial"]``, for images that are stored there.
    pixels
        Edge of a patch after resizing.
    """

    boxes: IntArray
    section: pd.Series
    table: pd.DataFrame
    libraries: Mapping[str, Any]
    pixels: int
    _slides: dict[str, tuple[Slide, float]] = field(default_factory=dict, repr=False)
    _held: NDArray[np.uint8] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.boxes)

    def read(self, rows: IntArray) -> NDArray[np.uint8]:
        """Read patches, ``(b, pixels, pixels, 3)``."""
        if self._held is not None:
            return self._held[rows]
        patches = np.empty((len(rows), self.pixels, self.pixels, 3), np.uint8)
        names = self.section.to_numpy()[rows].astype(str)
        # section by section, because only one decoded image is held
        for at in np.argsort(names, kind="stable"):
            slide, scale = self._slide(names[at])
            patches[at] = slide.patch(self.boxes[rows[at]] * scale, self.pixels)
        return patches

    def hold(self) -> PatchReader:
        """Read all patches into memory, unless they take more than 4 GiB: training reads each of them many times."""
        if len(self) * self.pixels**2 * 3 <= _HELD:
            self._held = self.read(np.arange(len(self)))
        return self

    def _slide(self, name: str) -> tuple[Slide, float]:
        if name not in self._slides:
            row = self.table.loc[self.table["section"].astype(str) == name].iloc[0]
            where = str(row["image"])
            if where in _IMAGES:
                slide = slide_of_array(self.libraries[name]["images"][where], name)
            else:
                slide = open_slide(Path(where))
            # one decoded image at a time: patches are read section by section
            self._slides = {name: (slide, float(row["scale"]))}
        return self._slides[name]
