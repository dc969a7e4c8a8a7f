"""Published sets of labelled genes."""

from __future__ import annotations

from difflib import get_close_matches
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd

from scllm.datasets._fetch import fetch

__all__ = ["gene_set"]

_NAME = "dosage_sensitivity"
_SOURCE = (
    "https://raw.githubusercontent.com/cx0/geneformer-finetune/c2a1e73cb7d1ff08061c15d600c45db5d84cd04b/"
    "dosage_sens_tf/most_reliable_dosage_{kind}_TFs.csv"
)
_CHECKSUMS = {
    "sensitive": "sha256:48c9a1c4b2df25ff30d5ee70a5b8ca6fd65720c0b5dd6daa458150ea62ee9f65",
    "insensitive": "sha256:8021f10a160b0cb8a21c866a42f27e695251362db0249e24af899b76b67e6c90",
}
_COLUMNS = ("ensembl_id", "gene_symbol", "dosage_sensitive")


def gene_set(name: str = _NAME, path: str | PathLike[str] | None = None) -> pd.DataFrame:
    """Load a published set of labelled genes: ``"dosage_sensitivity"``, 490 human transcription factors.

    122 of them are sensitive to dosage (losing one copy has an effect), 368 are not. These are the most reliable sets
    of Ni et al., *Frontiers in Genetics* 2019, doi:10.3389/fgene.2019.01208, on which Geneformer was evaluated
    (Theodoris et al., *Nature* 2023). They are downloaded once, with a checksum, and kept in
    ``scllm.settings.cache_dir``.

    Parameters
    ----------
    name
        Name of the set.
    path
        A local CSV file to read instead, with the columns ``ensembl_id``, ``gene_symbol`` and ``dosage_sensitive``
        (``True`` or ``False``).

    Returns
    -------
    A table with one row per gene, indexed by ``ensembl_id``: ``gene_symbol`` and ``dosage_sensitive`` (bool). Pass it
    to ``scllm.tl.classify_genes(adata, model, labels=...)``.

    Examples
    --------
    >>> genes = scllm.datasets.gene_set("dosage_sensitivity")  # doctest: +SKIP
    >>> scllm.tl.classify_genes(adata, model, labels=genes)  # doctest: +SKIP
    """
    if name != _NAME:
        close = get_close_matches(str(name), [_NAME], n=1, cutoff=0.3)
        offer = f"Did you mean {close[0]!r}?" if close else f"Pass {_NAME!r}."
        offer = f"For a file of your own: path={str(name)!r}." if Path(name).suffix else offer
        raise ValueError(f"Expected name to be one of {[_NAME]}, got {name!r}. {offer}")
    return _fetched() if path is None else _read(Path(path))


def _fetched() -> pd.DataFrame:
    advice = (
        "Download the CSV files on a machine with a connection, or use a table of your own with the columns "
        f"{', '.join(_COLUMNS)}, and pass it with path=."
    )
    parts = []
    for kind, checksum in _CHECKSUMS.items():
        url = _SOURCE.format(kind=kind)
        file = fetch(f"gene_sets/{url.rsplit('/', 1)[1]}", url, checksum, advice=advice)
        parts.append(pd.read_csv(file).assign(dosage_sensitive=kind == "sensitive"))
    table = pd.concat(parts).rename(columns={"gene_name": "gene_symbol"})
    return table.set_index("ensembl_id").sort_index()


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a CSV file with the columns {_COLUMNS} at {path}, but it does not exist. Check the path."
        )
    try:
        table = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise ValueError(
            f"Expected the columns {_COLUMNS} in {path}, got {list(table.columns)[:8]}. Rename them, or use another."
        )
    if table.empty:
        raise ValueError(f"Expected one row per gene in {path}, but it has no rows. Pass another file.")
    bad = np.flatnonzero([not isinstance(value, bool) for value in table["dosage_sensitive"].tolist()])
    if len(bad):
        raise ValueError(
            f"Expected dosage_sensitive to be True or False in every row of {path}, got "
            f"{table['dosage_sensitive'].iloc[bad[0]]!r} for {table['ensembl_id'].iloc[bad[0]]!r}. Correct the file."
        )
    table = table.astype({"dosage_sensitive": bool})
    return table.set_index("ensembl_id")[list(_COLUMNS[1:])]
