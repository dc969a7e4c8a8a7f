"""Other loaders of cells: AnnData's AnnLoader and scDataset, each with a collate function in numpy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from anndata import AnnData
from anndata.experimental import AnnLoader

from scllm.data.encode.base import CROP
from scllm.kernels.draws import uniform_entries

__all__ = ["ann_batches", "block_batches", "collate"]


def ann_batches(adata: AnnData, batch_size: int, n_batches: int) -> Iterator[np.ndarray]:
    """Yield the first batches of a shuffled AnnLoader, dense; data are only read when ``.X`` is accessed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AnnLoader is deprecated but still in use
        batches = AnnLoader(adata, batch_size=batch_size, shuffle=True, use_default_converter=True)
        for view in islice(batches, n_batches):
            yield torch.as_tensor(view.X).numpy()


def block_batches(
    adata: AnnData, batch_size: int, n_batches: int, *, block: int = 16, fetch: int = 64, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield batches sampled like scDataset: blocks of rows are shuffled, fetched for many batches and dealt at random.

    This is a short implementation of our own. The package reads and distributes rows in the same way (see row 4).
    """
    rng = np.random.default_rng(seed)
    starts = rng.permutation(np.arange(0, adata.n_obs, block))
    order = np.concatenate([np.arange(start, min(start + block, adata.n_obs)) for start in starts])
    order = order[: n_batches * batch_size]
    for start in range(0, len(order), fetch * batch_size):
        fetched = np.sort(order[start : start + fetch * batch_size])
        counts = adata[fetched].to_memory().X
        dealt = rng.permutation(len(fetched))
        for at in range(0, len(dealt), batch_size):
            yield counts[dealt[at : at + batch_size]].toarray()


def collate(
    dense: np.ndarray, *, n_bins: int | None = 51, max_len: int = 1_201, keys: np.ndarray | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make genes, values and boundaries of a packed batch in numpy, cell by cell.

    Non-zero entries of each row are binned with ``np.quantile`` and two ``np.searchsorted`` (not with ``n_bins=None``,
    as for cells that are already binned), reduced to a random subset of at most ``max_len - 1``, and preceded by
    ``<cls>``. With ``keys``, the same subset is drawn as in the loader, to compare the outputs.
    """
    rng = np.random.default_rng(seed)
    genes, values = [], []
    for i, row in enumerate(dense):
        stored = row.nonzero()[0]
        value = row[stored]
        if n_bins is not None and len(stored):
            edges = np.quantile(value, np.linspace(0, 1, n_bins - 1))
            below, upto = np.searchsorted(edges, value), np.searchsorted(edges, value, side="right")
            value = (below + upto + 1) // 2
        if len(stored) > max_len - 1:
            kept = rng.permutation(len(stored))[: max_len - 1]
            if keys is not None:
                ends = np.array([0, len(stored)])
                draws = uniform_entries(ends, stored.astype(np.int32), keys[i : i + 1], CROP)
                kept = np.sort(np.argsort(draws)[: max_len - 1])
            stored, value = stored[kept], value[kept]
        # in the vocabulary of the benchmarks, <cls> comes after the genes
        genes.append(np.concatenate([[len(row)], stored]))
        values.append(np.concatenate([[0], value]))
    ends = np.cumsum([0, *map(len, genes)]).astype(np.int32)
    packed = torch.from_numpy(np.concatenate(genes)), torch.from_numpy(np.concatenate(values).astype(np.float32))
    return *packed, torch.from_numpy(ends)
