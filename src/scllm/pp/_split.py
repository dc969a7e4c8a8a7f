"""Splitting cells into train, validation and test."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata, obs_column
from scllm._log import warn
from scllm._results import free_key, record, record_name
from scllm.data.split import PARTS, split_cells

__all__ = ["split"]


def split(
    adata: AnnData,
    *,
    fractions: tuple[float, ...] = (0.97, 0.03),
    group_key: str | None = None,
    stratify: str | None = None,
    key_added: str = _keys.SPLIT,
    random_state: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Split cells into ``train`` and ``validation``, and with three fractions also ``test``.

    Functions that train a model use the column with ``validation="split"`` and never read ``test``.

    Parameters
    ----------
    adata
        Cells by genes; only ``obs`` is read.
    fractions
        Fraction of cells in each part; they add up to one.
    group_key
        Column of groups (donors, samples) that are never divided. Validation is then on groups that are not in the
        training cells.
    stratify
        Column of labels; every label is split by the same fractions.
    key_added
        Column to write.
    random_state
        Random seed.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.obs[key_added]``
        Categorical with ``train``, ``validation`` and, with three fractions, ``test``.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.split(adata, fractions=(0.8, 0.2))
    >>> round(float((adata.obs["split"] == "train").mean()), 2)
    0.8
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "obs", key_added)
    if group_key is not None and stratify is not None:
        raise ValueError(
            f"Expected one of group_key and stratify, got group_key={group_key!r} and stratify={stratify!r}. Whole "
            "groups cannot also be divided by label: leave one out."
        )
    groups = None if group_key is None else obs_column(adata.obs, group_key)
    labels = None if stratify is None else obs_column(adata.obs, stratify)
    parts = split_cells(adata.n_obs, fractions, groups=groups, stratify=labels, random_state=random_state)
    names = list(PARTS[: len(fractions)])
    empty = [name for number, name in enumerate(names) if not (parts == number).any()]
    if empty:
        warn(
            f"Splitting {adata.n_obs} cells by fractions={fractions} leaves no cells for {' and '.join(empty)}. Pass "
            "larger fractions if that is not what you want."
        )
    adata = adata.copy() if copy else adata
    adata.obs[key] = pd.Categorical.from_codes(np.asarray(parts), categories=names)
    params = {"fractions": fractions, "group_key": group_key, "stratify": stratify, "random_state": random_state}
    record_name(adata, "obs", key_added)
    record(adata, "split", params)
    return adata if copy else None
