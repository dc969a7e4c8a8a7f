"""How labels are stored in a table, so that predictions of them come back alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["Categories"]

_TEXT = "text"


@dataclass(frozen=True)
class Categories:
    """The categories of a column of labels: integers, booleans and ordered ones too.

    Models know labels by their names. This is what it takes to make a column of them that compares with the one that
    they were learnt from.

    Parameters
    ----------
    names
        All categories as strings, in their order, those that no cell has among them.
    dtype
        Of the categories: a type of numbers or booleans, such as ``"int64"``, or ``"text"`` for all others.
    ordered
        Whether their order means something.
    """

    names: tuple[str, ...]
    dtype: str = _TEXT
    ordered: bool = False

    @classmethod
    def of(cls, column: pd.Series) -> Categories:
        """Those of a column of any type that holds labels."""
        column = column.astype("category")
        if not column.cat.categories.map(str).is_unique:  # 1 and "1", of which one is not in use
            column = column.cat.remove_unused_categories()
        values = column.cat.categories
        is_number = pd.api.types.is_numeric_dtype(values.dtype) and values.dtype.kind != "c"
        # pandas cannot compare a column with nullable booleans in it
        is_plain = not isinstance(values.dtype, (pd.ArrowDtype, pd.BooleanDtype))
        dtype = values.dtype if is_plain or not is_number else values.dtype.numpy_dtype
        return cls(tuple(map(str, values)), str(dtype) if is_number else _TEXT, bool(column.cat.ordered))

    @classmethod
    def from_dict(cls, content: dict) -> Categories:
        """As ``dataclasses.asdict`` gave it, perhaps by way of JSON."""
        return cls(**{**content, "names": tuple(content["names"])})

    @property
    def is_text(self) -> bool:
        """Whether labels are strings, so that cells without one can be called something."""
        return self.dtype == _TEXT

    def column(self, labels: NDArray[np.object_], also: Sequence[str] = ()) -> pd.Categorical:
        """A column of labels by their names; missing where the name is ``None`` or none of these.

        Names in ``also`` become the last categories. They have no rank, so the order means nothing any more.
        """
        more = [name for name in also if name not in self.names]
        names = pd.Index([*self.names, *more], dtype=object)
        ordered = self.ordered and not more
        return pd.Categorical.from_codes(names.get_indexer(labels), categories=self._values(names), ordered=ordered)

    def _values(self, names: pd.Index) -> pd.Index:
        if self.is_text:
            return pd.Index(names.to_list())
        dtype = pd.api.types.pandas_dtype(self.dtype)
        plain = dtype if isinstance(dtype, np.dtype) else dtype.numpy_dtype
        values = names == "True" if plain.kind == "b" else np.array(names.to_list()).astype(plain)
        return pd.Index(values, dtype=dtype)
