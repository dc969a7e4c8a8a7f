"""Split cells into training and validation cells, and weigh groups of training cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from scllm._checks import obs_column
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.mixture import cell_weights
from scllm.data.split import split_cells

__all__ = ["column_or_all", "divide", "mixture"]


def divide(
    source: CellSource,
    validation: float | str | None,
    *,
    group_key: str | None,
    stratify: pd.Series | None = None,
    rows: IntArray | None = None,
    random_state: int = 0,
) -> tuple[IntArray, IntArray]:
    """Return the rows of the training and of the validation cells."""
    rows = np.arange(source.n_obs) if rows is None else rows
    if isinstance(validation, str):
        column = obs_column(source.obs(column_or_all(source, validation)), validation).astype(object)
        found, asked = (set(cells.dropna().astype(str)) for cells in (column, column.iloc[rows]))
        if not found >= {"train", "validation"} or asked - {"train", "validation", "test"}:
            raise ValueError(
                f"Expected obs[{validation!r}] to hold 'train' and 'validation' (and optionally 'test'), got "
                f"{sorted(found)[:5]}. Make such a column with pp.split(adata)."
            )
        part = column.iloc[rows].astype(str).to_numpy()
        training, held_out = rows[part == "train"], rows[part == "validation"]
        for name, cells in (("train", training), ("validation", held_out)):
            if not len(cells):
                raise ValueError(
                    f"Expected cells with a label or value that are {name!r} in obs[{validation!r}], but none of "
                    f"{len(rows)} is. Label other cells, or split again."
                )
        if group_key is not None:
            _check_whole(source, group_key, validation, training, held_out)
        return training, held_out
    if not validation:
        if group_key is not None:
            raise TypeError(
                f"group_key={group_key!r} names groups to hold out for validation, but validation={validation} holds "
                "out no cells. Leave one of the two out."
            )
        return rows, rows[:0]
    if not 0 < validation < 1:
        raise ValueError(
            f"Expected validation to be a fraction from 0 to 1 or a column of obs, got {validation}. Pass for example "
            "0.1, or 0 to hold out no cells."
        )
    if len(rows) < 2:
        raise ValueError(
            f"Expected at least 2 cells, one to train on and one for validation, got {len(rows)}. Pass validation=0."
        )
    groups = None if group_key is None else _groups(source, group_key, rows)
    share = min(max(validation, 1 / len(rows)), 1 - 1 / len(rows))  # at least one cell on each side
    part = split_cells(
        len(rows),
        (1 - share, share),
        groups=groups,
        stratify=None if groups is not None else stratify,
        random_state=random_state,
    )
    return rows[part == 0], rows[part == 1]


def mixture(source: CellSource, group_weights: Mapping[str, Any] | None, training: IntArray) -> FloatArray | None:
    """Return the weights of training cells; ``None`` without ``group_weights``."""
    if group_weights is None:
        return None
    key = group_weights["key"]
    of_training = _groups(source, key, training)
    groups = obs_column(source.obs(column_or_all(source, key)), key)
    return cell_weights(group_weights, groups, of_training)


def _check_whole(source: CellSource, group_key: str, validation: str, training: IntArray, held_out: IntArray) -> None:
    """Raise if the train / validation column splits a group."""
    divided = sorted(
        set(_groups(source, group_key, training).astype(str)) & set(_groups(source, group_key, held_out).astype(str))
    )
    if divided:
        raise ValueError(
            f"Expected each group of obs[{group_key!r}] entirely in 'train' or in 'validation', but "
            f"obs[{validation!r}] has cells of {divided[0]!r} in both. Make the "
            f"column with pp.split(adata, group_key={group_key!r}), or leave group_key= out."
        )


def _groups(source: CellSource, group_key: str, rows: IntArray) -> pd.Series:
    """Return the group of each cell in ``rows``; raise if a cell has none."""
    groups = obs_column(source.obs(column_or_all(source, group_key)), group_key).iloc[rows]
    n_lacking = int(groups.isna().sum())
    if n_lacking:
        raise ValueError(
            f"Expected a group for every cell, but {n_lacking} of {len(rows)} cells have no group in "
            f"obs[{group_key!r}]. Fill them in, or drop those cells."
        )
    return groups


def column_or_all(source: CellSource, key: str) -> list[str]:
    """Return the column if it exists, and otherwise all columns, so that the error can offer close names."""
    return [key] if key in source.obs_columns else list(source.obs_columns)
