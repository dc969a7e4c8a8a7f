"""Human pancreas cells from nine technologies."""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path

import anndata as ad
from anndata import AnnData

from scllm import _keys
from scllm.datasets._fetch import fetch, figshare_md5

__all__ = ["pancreas"]

_ARTICLE, _FILE = 12420968, 24539828
_URL = f"https://figshare.com/ndownloader/files/{_FILE}"
_SHAPE = (16_382, 19_093)
# names of the columns in the file
_NAMES = {"celltype": _keys.CELL_TYPE, "tech": _keys.BATCH}


def pancreas(path: str | PathLike[str] | None = None) -> AnnData:
    """Load 16,382 human pancreas cells x 19,093 genes from nine technologies, a common benchmark of data integration.

    The data were compiled for scIB (Luecken et al., *Nature Methods* 2022, doi:10.1038/s41592-021-01336-8;
    doi:10.6084/m9.figshare.12420968) and have 14 cell types. The file of about 300 MB is downloaded once, verified by
    the checksum that figshare states, and kept in ``scllm.settings.cache_dir``.

    Parameters
    ----------
    path
        A local file to read instead: ``human_pancreas_norm_complexBatch.h5ad``, or another h5ad of pancreas cells.

    Returns
    -------
    The cells as they are in the file: normalised values in ``X``, ``layers["counts"]`` (not integers for full-length
    technologies), ``obs["cell_type"]`` and ``obs["batch"]`` (the technology).

    Examples
    --------
    >>> adata = scllm.datasets.pancreas()  # doctest: +SKIP
    >>> adata.X = adata.layers["counts"]  # doctest: +SKIP
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected an h5ad file of pancreas cells at {path}, but it does not exist. Check the path."
        )
    file = (
        Path(path)
        if path is not None
        else fetch(
            "human_pancreas_norm_complexBatch.h5ad",
            _URL,
            partial(figshare_md5, _ARTICLE, _FILE),
            advice="Download it on a machine with a connection, and pass it with path=.",
        )
    )
    try:
        adata = ad.read_h5ad(file)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"Expected a complete .h5ad file, but {file} cannot be read ({error}). Copy or download it again."
        ) from error
    if path is None and adata.shape != _SHAPE:
        raise ValueError(
            f"Expected {_SHAPE[0]} cells x {_SHAPE[1]} genes in {file}, got {adata.n_obs} x {adata.n_vars}. Delete the "
            "file, so that it is downloaded again."
        )
    adata.obs = adata.obs.rename(columns={old: new for old, new in _NAMES.items() if new not in adata.obs})
    missing = [name for name in _NAMES.values() if name not in adata.obs]
    if missing:
        raise ValueError(
            f"Expected a column {missing[0]!r} in obs of {file}, got {list(adata.obs.columns)[:8]}. Pass a file of "
            "labelled cells."
        )
    return adata
