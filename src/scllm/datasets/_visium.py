"""Reading the output folder of Space Ranger."""

from __future__ import annotations

import json
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from scllm import _keys
from scllm._log import log
from scllm._names import listed
from scllm.data.spots import spot_pitch

__all__ = ["read_visium"]

_POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet")
_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_IMAGES = {"hires": "tissue_hires_image.png", "lowres": "tissue_lowres_image.png"}
_PITCH = 100.0  # distance between the centres of neighbouring Visium spots, in micrometres
# files by which folders of other technologies are recognised
_OTHERS = {
    "experiment.xenium": "Xenium",
    "cell_feature_matrix.h5": "Xenium",
    "binned_outputs": "Visium HD",
    "detected_transcripts.csv": "MERSCOPE",
    "barcodes.tsv.gz": "a count matrix without positions",
}


def read_visium(
    path: str | PathLike[str], *, library_id: str | None = None, image: str | PathLike[str] | None = None
) -> AnnData:
    """Read a Visium section from the ``outs`` folder of Space Ranger.

    Unlike the readers of scanpy and squidpy, this one needs neither the ``.h5`` matrix nor the high-resolution image.
    It reads ``filtered_feature_bc_matrix`` as a folder or as ``.h5``, positions with or without a header, and the
    images that are there.

    Parameters
    ----------
    path
        The folder with ``filtered_feature_bc_matrix`` (or its ``.h5``) and ``spatial``.
    library_id
        Name of the section in ``uns["spatial"]``. ``None``: the name of the folder above ``outs``.
    image
        The full-size H&E image, which is noted for :func:`scllm.pp.image_patches`.

    Returns
    -------
    Spots in tissue by genes: counts in ``X`` (CSR), gene symbols as ``var_names`` (made unique), ``var["gene_ids"]``,
    ``obs["in_tissue"]``, ``obs["array_row"]`` and ``obs["array_col"]``, x and y in pixels of the full-size image in
    ``obsm["spatial"]``, and images and scale factors in ``uns["spatial"][library_id]``. ``microns_per_pixel`` among the
    scale factors follows from the distance of 100 µm between spots.

    Examples
    --------
    >>> adata = scllm.datasets.read_visium("sample/outs")  # doctest: +SKIP
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected the outs folder of Space Ranger at {folder}, but it does not exist.")
    spatial = folder / "spatial"
    if not spatial.is_dir():
        raise ValueError(_other_technology(folder))
    adata = _counts(folder)
    positions = _positions(spatial)
    missing = adata.obs_names.difference(positions.index)
    if len(missing):
        raise ValueError(
            f"Expected a position for every barcode, but {len(missing)} of {adata.n_obs} barcodes of the matrix "
            f"({listed(list(missing))}) are not in the {len(positions)} positions (first: {positions.index[0]!r}) of "
            f"{spatial}. The two may come from different samples: copy the folder again."
        )
    there = positions.loc[adata.obs_names]
    adata.obs = there[["in_tissue", "array_row", "array_col"]].astype(int)
    adata.obsm[_keys.SPATIAL] = there[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    adata = adata[(adata.obs["in_tissue"] == 1).to_numpy()].copy()
    library_id = library_id or (folder.parent.name if folder.name == "outs" else folder.name)
    adata.uns[_keys.SPATIAL] = {str(library_id): _library(spatial, positions, image)}
    log.info("reading %d spots in tissue and %d genes of section %r", adata.n_obs, adata.n_vars, str(library_id))
    return adata


def _other_technology(folder: Path) -> str:
    seen = [kind for name, kind in _OTHERS.items() if (folder / name).exists()]
    what = f"It looks like {seen[0]}." if seen else f"It holds {listed(sorted(p.name for p in folder.iterdir()))}."
    advice = "Visium HD, Xenium and MERSCOPE are read by spatialdata-io." if seen else "Pass the outs folder."
    return (
        f"Expected a folder 'spatial' in {folder}, as Space Ranger writes it for Visium, but there is none. {what} "
        f"{advice}"
    )


def _counts(folder: Path) -> AnnData:
    import scanpy as sc

    matrix = folder / "filtered_feature_bc_matrix"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*names are not unique")  # they are made unique below
        if matrix.with_suffix(".h5").is_file():
            adata = sc.read_10x_h5(matrix.with_suffix(".h5"))
        elif matrix.is_dir():
            adata = sc.read_10x_mtx(matrix, var_names="gene_symbols", make_unique=False)
        else:
            raise FileNotFoundError(
                f"Expected filtered_feature_bc_matrix as a folder or as .h5 in {folder}, but there is neither. Copy "
                "the complete outs folder."
            )
    adata.var_names_make_unique()
    adata.X = adata.X.tocsr().astype(np.float32)
    return adata


def _positions(spatial: Path) -> pd.DataFrame:
    """Read the positions of all spots, by barcode; the file of older versions has no header."""
    found = next((spatial / name for name in _POSITIONS if (spatial / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"Expected the positions of spots ({', '.join(_POSITIONS)}) in {spatial}, but there are none. Copy the "
            "complete outs folder."
        )
    if found.suffix == ".parquet":
        table = pd.read_parquet(found)
    else:
        has_header = found.read_text().lstrip().startswith("barcode")
        table = pd.read_csv(found, header=0 if has_header else None, names=None if has_header else _COLUMNS)
    lacking = [name for name in _COLUMNS if name not in table]
    if lacking:
        raise ValueError(f"Expected the columns {_COLUMNS} in {found}, but {lacking} are missing. Copy the file again.")
    return table.set_index("barcode")


def _library(spatial: Path, positions: pd.DataFrame, image: str | PathLike[str] | None) -> dict[str, Any]:
    """Read images and scale factors as scanpy lays them out."""
    file = spatial / "scalefactors_json.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected scale factors in {file}, without which spots cannot be placed in the images, but the file does "
            "not exist. Copy the complete outs folder."
        )
    factors = {str(name): float(value) for name, value in json.loads(file.read_text()).items()}
    xy = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    factors.setdefault("microns_per_pixel", _PITCH / spot_pitch(xy))
    images = {level: _image(spatial / name) for level, name in _IMAGES.items() if (spatial / name).is_file()}
    metadata = {} if image is None else {"source_image_path": str(Path(image).absolute())}
    return {"images": images, "scalefactors": factors, "metadata": metadata}


def _image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"Expected a complete image in {path}, but it cannot be read ({error}). Copy the file again."
        ) from error
