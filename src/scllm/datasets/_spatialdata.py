"""Reading the spots of a SpatialData folder, placed in the pixels of their image."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData

from scllm import _keys
from scllm._log import log
from scllm._names import listed
from scllm._typing import FloatArray

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["read_spatialdata"]

_USUAL = "global"  # coordinate system that SpatialData makes if none is named


def read_spatialdata(
    data: str | PathLike[str] | SpatialData,
    *,
    image: str | Mapping[str, str] | None = None,
    table: str | None = None,
    coordinate_system: str | None = None,
) -> AnnData:
    """Read spots and their expression from SpatialData, with positions in pixels of the image.

    SpatialData stores for each image and each set of spots a transformation to a common coordinate system. The centre
    of each spot is transformed to that system, and from there to the pixels of the full-size image.

    Parameters
    ----------
    data
        Folder of a SpatialData object, or the object, which must have been stored because patches are read from its
        folder.
    image
        Name of the H&E image, or a mapping of regions (sets of spots) to images. ``None``: the only image.
    table
        Name of the table with the expression. ``None``: the only table.
    coordinate_system
        Coordinate system of spots and image. ``None``: ``"global"`` if both have it, or else the first that both have.

    Returns
    -------
    A copy of the table, with x and y of each spot in ``obsm["spatial"]``, and in ``uns["spatial"]`` the path of the
    image of each region, which :func:`scllm.pp.image_patches` reads.

    Examples
    --------
    >>> adata = scllm.datasets.read_spatialdata("data.zarr", image="he")  # doctest: +SKIP
    """
    found = _opened(data)
    name = _only(found.tables, table, "table")
    adata = found.tables[name].copy()
    attributes = adata.uns.get("spatialdata_attrs", {})
    if not {"region_key", "instance_key"} <= set(attributes):
        raise ValueError(
            f"Expected a table that names the region of each spot, with 'spatialdata_attrs' in its uns, got {name!r} "
            "without. Pass another table=."
        )
    region = adata.obs[attributes["region_key"]].astype(str)
    instance = adata.obs[attributes["instance_key"]]
    xy, libraries = np.empty((adata.n_obs, 2)), {}
    for one in dict.fromkeys(region):
        asked = image.get(one) if isinstance(image, Mapping) else image
        picture = _only(found.images, asked, "image")
        rows = np.flatnonzero(region == one)
        xy[rows] = _in_pixels(found, one, picture, coordinate_system, instance.iloc[rows])
        path = Path(str(found.path)).absolute() / "images" / picture
        libraries[one] = {"images": {}, "scalefactors": {}, "metadata": {"source_image_path": str(path)}}
    adata.obsm[_keys.SPATIAL] = xy
    adata.uns[_keys.SPATIAL] = libraries
    log.info("reading %d spots of %d regions and %d genes", adata.n_obs, len(libraries), adata.n_vars)
    return adata


def _opened(data: Any) -> Any:
    try:
        import spatialdata
    except ImportError as error:
        raise ImportError(
            'Reading SpatialData needs spatialdata. Install it with pip install "scllm-tools[spatial]".'
        ) from error
    if isinstance(data, (str, PathLike)):
        if not Path(data).is_dir():
            raise FileNotFoundError(f"Expected a SpatialData folder at {data}, but it does not exist. Check the path.")
        return spatialdata.read_zarr(data)
    if data.path is None:
        raise ValueError(
            "Expected a SpatialData object that is stored, because its image is read in windows, got one in memory. "
            "Call data.write('data.zarr') first."
        )
    return data


def _only(elements: Mapping[str, Any], asked: str | None, what: str) -> str:
    """Return the name that was asked for, or the only one."""
    names = list(map(str, elements))
    if asked is None and len(names) == 1:
        return names[0]
    if asked not in names:
        seen = f"got {asked!r}" if asked is not None else "got none"
        raise ValueError(
            f"Expected {what} to be one of the {what}s of the SpatialData object ({listed(names)}), {seen}. Pass its "
            f"name as {what}=."
        )
    return asked


def _in_pixels(data: Any, region: str, image: str, system: str | None, instances: Any) -> FloatArray:
    """Return the centres of spots in pixels of an image, ``(n, 2)``."""
    import spatialdata
    from spatialdata.transformations import get_transformation

    if region not in data:
        raise ValueError(
            f"Expected the spots of region {region!r} in the SpatialData object, which has none. Add them."
        )
    there = [set(get_transformation(data[element], get_all=True)) for element in (region, image)]
    common = sorted(map(str, there[0] & there[1]), key=lambda name: (name != _USUAL, name))
    if (system is not None and system not in common) or not common:
        raise ValueError(
            f"Expected a coordinate system of both the spots {region!r} and the image {image!r}, which share "
            f"{listed(common)}, got {system!r}. Pass another coordinate_system=, or another image=."
        )
    system = system or common[0]
    centres = spatialdata.get_centroids(data[region], coordinate_system=system).compute()
    lacking = [one for one in instances if one not in centres.index]
    if lacking:
        raise ValueError(
            f"Expected a position for every spot of the table, but {len(lacking)} of {len(instances)} "
            f"({listed(lacking)}) are not in {region!r}. Remove them from the table."
        )
    centres = centres.loc[list(instances), ["x", "y"]].to_numpy(float)
    affine = get_transformation(data[image], system).to_affine_matrix(("x", "y"), ("x", "y"))
    return np.linalg.solve(affine[:2, :2], (centres - affine[:2, 2]).T).T
