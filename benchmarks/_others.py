"""How others load cells: AnnData's loader and scDataset, with a collate function in numpy behind them."""

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
    """The first batches of a shuffled AnnLoader, dense; ``.X`` is touched, which is what reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what is used
        batches = AnnLoader(adata, batch_size=batch_size, shuffle=True, use_default_converter=True)
        for view in islice(batches, n_batches):
            yield torch.as_tensor(view.X).numpy()


def block_batches(
    adata: AnnData, batch_size: int, n_batches: int, *, block: int = 16, fetch: int = 64, seed: int = 0
) -> Iterator[np.ndarray]:
    """scDataset's sampling: blocks of neighbours shuffled, many batches fetched at once in file order, dealt at random.

    Written here in the few lines that it takes; the package reads and deals in the same way, see row 4.
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
    """Genes, values and boundaries of a packed batch in numpy, cell by cell.

    Of each row: its non-zero entries; their bins, by ``np.quantile`` and two ``np.searchsorted`` (``n_bins=None``
    leaves the values as they are, as for cells binned beforehand); at most ``max_len - 1`` of them at random; ``<cls>``
    in front. ``keys`` draws the crop as the loader does, to compare the outputs.
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
        # the vocabulary of the benchmarks: the genes, then <cls>
        genes.append(np.concatenate([[len(row)], stored]))
        values.append(np.concatenate([[0], value]))
    ends = np.cumsum([0, *map(len, genes)]).astype(np.int32)
    packed = torch.from_numpy(np.concatenate(genes)), torch.from_numpy(np.concatenate(values).astype(np.float32))
    return *packed, torch.from_numpy(ends)
