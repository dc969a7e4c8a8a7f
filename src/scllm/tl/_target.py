"""The training target: labels or values in a column of ``obs``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scllm._checks import holds_numbers, labels, obs_column
from scllm._labels import Categories
from scllm._log import DataWarning, warn
from scllm._names import listed
from scllm._typing import IntArray

__all__ = ["Target", "find_target"]

# Missing labels become one of these when a column is converted to text.
_MISSING_AS_TEXT = {"nan", "NaN", "None", "<NA>", "NaT", ""}


@dataclass(frozen=True)
class Target:
    """A column of ``obs``: codes of ``classes`` (-1 is missing), or values if ``classes`` is ``None`` (NaN is missing).

    ``categories`` records how the column stores its labels.
    """

    key: str
    classes: tuple[str, ...] | None
    column: NDArray
    categories: Categories | None = None

    @property
    def is_there(self) -> NDArray[np.bool_]:
        """Mask of the cells with a label or value."""
        return np.isfinite(self.column) if self.classes is None else self.column >= 0

    @property
    def n_outputs(self) -> int:
        """Number of outputs that a method predicts for each cell."""
        return 1 if self.classes is None else len(self.classes)

    @property
    def advice(self) -> str:
        """Advice for labels with too few cells, which may be numbers that were read as text."""
        if pd.to_numeric(pd.Series(self.classes), errors="coerce").notna().all():
            return f"If they are values: adata.obs[{self.key!r}] = adata.obs[{self.key!r}].astype(float)."
        return "Merge them, or pass a column with fewer labels with `key=`."

    def counts(self, cells: IntArray) -> IntArray:
        """Count the cells of each label."""
        codes = self.column[cells]
        return np.bincount(codes[codes >= 0], minlength=self.n_outputs)

    def names(self, codes: IntArray) -> NDArray[np.object_]:
        """Return the class names of the codes."""
        return np.array(self.classes, dtype=object)[codes]


def find_target(obs: pd.DataFrame, key: str) -> Target:
    """Read the column to predict; raise if it holds neither labels nor values, and warn of cells without one."""
    column = obs_column(obs, key)
    if column.isna().all():
        raise ValueError(
            f"Expected labels or values in obs[{key!r}], but all {len(obs)} cells have none. Pass another column with "
            "`key=`."
        )
    if holds_numbers(column) and not pd.api.types.is_float_dtype(column):
        first, what = column.dropna().iloc[0], "numbers as objects" if column.dtype == object else "integers"
        raise ValueError(
            f"Expected obs[{key!r}] to hold labels or float values, got {what} (first: {first}). If they are labels, "
            f"use adata.obs[{key!r}] = adata.obs[{key!r}].astype('category'). If they are values, use .astype(float)."
        )
    if pd.api.types.is_float_dtype(column):
        target = Target(key, None, column.to_numpy(np.float64, na_value=np.nan))
        n_values = len(np.unique(target.column[target.is_there]))
        if n_values < 2:
            raise ValueError(
                f"Expected at least 2 distinct values in obs[{key!r}], got {n_values}. Pass another column with `key=`."
            )
    else:
        classes = labels(obs, key)
        codes = classes.cat.codes.to_numpy().astype(np.int64)
        target = Target(key, tuple(classes.cat.categories), codes, Categories.of(column))
        not_names = [name for name in target.classes if name in _MISSING_AS_TEXT]
        where = f"adata.obs[{key!r}]"
        if not_names:
            warn(
                f"{where} holds {listed(not_names)}, which is learnt as a class. If such cells have no label, use: "
                f"{where} = {where}.mask({where}.isin({not_names})).",
                DataWarning,
            )
    n_missing = int((~target.is_there).sum())
    if n_missing:
        what = "finite value" if target.classes is None else "label"
        warn(
            f"{n_missing} of {len(obs)} cells have no {what} in obs[{key!r}]. The head on it is trained without them. "
            f"Drop these cells first if no other column labels them.{_of_whole_numbers(target)}",
            DataWarning,
        )
    return target


def _of_whole_numbers(target: Target) -> str:
    """Say that whole numbers are taken as values, because integer labels become floats if one is missing."""
    values = target.column[target.is_there]
    if target.classes is not None or (values % 1).any():
        return ""
    return (
        " The other cells hold whole numbers, which are taken as values. If they are labels: "
        f"adata.obs[{target.key!r}] = adata.obs[{target.key!r}].astype('Int64').astype('category')."
    )
