"""Human pancreas by nine technologies."""

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
# what the file calls them
_NAMES = {"celltype": _keys.CELL_TYPE, "tech": _keys.BATCH}


def pancreas(path: str | PathLike[str] | None = None) -> AnnData:
    """16,382 cells of human pancreas x 19,093 genes, by nine technologies; the usual test of integration.

    Put together for scIB (Luecken et al., *Nature Methods* 2022, doi:10.1038/s41592-021-01336-8;
    doi:10.6084/m9.figshare.12420968): 14 cell types. About 300 MB, fetched once with the checksum that figshare states,
    and kept under ``scllm.settings.cache_dir``.

    Parameters
    ----------
    path
        A file to read in place of fetching one: ``human_pancreas_norm_complexBatch.h5ad``, or another pancreas in h5ad.

    Returns
    -------
    The cells as they are in the file: normalised values in ``X`` and ``layers["counts"]`` (of full-length technologies
    not whole numbers), with ``obs["cell_type"]`` and ``obs["batch"]`` (the technology).

    Examples
    --------
    >>> adata = scllm.datasets.pancreas()  # doctest: +SKIP
    >>> adata.X = adata.layers["counts"]  # doctest: +SKIP
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there, an h5ad file of pancreas cells expected. Check the path.")
    file = Path(path) if path is not None else fetch(
        "human_pancreas_norm_complexBatch.h5ad", _URL, partial(figshare_md5, _ARTICLE, _FILE),
        advice="Download it where there is a connection, and pass it with path=.",
    )  # fmt: skip
    try:
        adata = ad.read_h5ad(file)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}), a whole .h5ad file expected. Copy or download it again."
        ) from error
    if path is None and adata.shape != _SHAPE:
        raise ValueError(
            f"{file} holds {adata.n_obs} cells x {adata.n_vars} genes, {_SHAPE[0]} x {_SHAPE[1]} expected. Delete the "
            "file, so that it is fetched again."
        )
    adata.obs = adata.obs.rename(columns={old: new for old, new in _NAMES.items() if new not in adata.obs})
    missing = [name for name in _NAMES.values() if name not in adata.obs]
    if missing:
        raise ValueError(
            f"obs of {file} has no column {missing[0]!r} (it has {list(adata.obs.columns)[:8]}), cell types and "
            "batches expected. Pass a file of labelled cells."
        )
    return adata
