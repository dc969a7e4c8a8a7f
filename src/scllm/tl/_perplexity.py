"""Score the token sequence of each cell with a gene language model."""

from __future__ import annotations

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from scllm import _keys, metrics
from scllm._checks import check_adata
from scllm._results import free_key, record, record_name
from scllm._typing import IntArray
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.likelihood import N_ORDERS, gene_nats
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel
from scllm.tl._inputs import check_layer
from scllm.tl._ledger import warn_of_seen
from scllm.tl._model import ModelLike, gene_match, remember, resolve

__all__ = ["perplexity"]

# number of logits per batch by default: one gigabyte
_LOGITS = 2**28
_CELLS = 64
# number of genes collected before they are added to the counts
_NEW = 2**20


@closes_files
def perplexity(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    key_added: str = _keys.PERPLEXITY,
    layer: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Compute the perplexity of each cell under a gene language model.

    The token sequence of a cell is its genes in order of decreasing expression. The score is the mean negative log
    probability of each gene at its position, in nats per gene. Its exponential is the perplexity: the number of equally
    likely genes among which the model would be equally uncertain. Families differ in what a gene is predicted from.
    This is the *kind* of the score, and scores of different kinds cannot be compared:

    - ``"causal"`` (gpt2): predicted from the genes with higher expression. By the chain rule, this is the exact
      likelihood.
    - ``"permutation"`` (xlnet): predicted from the genes before it in a random order. The score is the mean over four
      fixed orders, each of which gives an exact likelihood.
    - ``"pseudo"`` (albert, and any masked model): predicted from all other genes, with one gene masked at a time. This
      is not a likelihood, and its values are lower, because only one gene is unknown at a time.

    Scores are always computed in fp32.

    Parameters
    ----------
    adata
        Cells by genes, with counts.
    model
        A gene language model or its path. ``None``: the model last recorded on ``adata``. A warning says how many cells
        come from donors or data sets that it was trained on.
    key_added
        Column to write.
    layer
        Layer to read. ``None``: ``X``.
    batch_size
        Number of cells per forward pass; changes only speed and memory.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.obs[key_added]``, ``adata.obs[key_added + "_nats"]``
        Perplexity of each cell, and its logarithm in nats per gene; NaN for a cell without genes.
    ``adata.uns["scllm"]["perplexity"]``
        ``params`` (with the ``kind``) and four values in nats per gene over all cells:

        - ``nats``: the model.
        - ``bound``: ``ln(n!) / n`` for the ``n`` genes of a cell. If the order of genes were random, no score
          could be lower; real orders are not random.
        - ``unigram``: a model that knows the frequency of each gene.
        - ``unigram_by_position``: a model that knows the frequency of each gene at each position of the sequence.

        The frequencies are those in ``adata``, without the gene that is scored.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=20)
    >>> model = scllm.models.build("gpt2", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.perplexity(adata, model)
    >>> bool((adata.obs["perplexity"] > 1).all())
    True
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "obs", key_added)
    chosen = resolve(model, adata)
    if chosen.likelihood is None:
        raise ValueError(
            f"Expected a gene language model, got a {chosen.family} model, which assigns no likelihood to a token "
            "sequence. Pretrain 'gpt2', 'albert' or 'xlnet'."
        )
    warn_of_seen(chosen.trained_on, adata.obs)
    source = open_source(adata, layer=layer)
    check_layer(source, chosen, layer, adata)
    match = gene_match(adata, source, chosen)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        at, nats = gene_nats(replica, batch)
        cell = batch.cell[at]
        # cell, position and gene are columns beside the nats, because forward returns one array
        return torch.stack([cell.float(), (at - batch.first[cell]).float(), batch.genes[at].float(), nats], dim=1)

    if batch_size is None:
        longest = min(chosen.encoder.max_len, len(chosen.vocab))
        batch_size = max(1, min(_CELLS, _LOGITS // (longest * len(chosen.vocab))))
    total, n_genes = np.zeros(source.n_obs), np.zeros(source.n_obs)
    places = _Places((chosen.encoder.max_len, len(chosen.vocab)))
    results = predict(
        chosen, source, match, forward, batch_size=batch_size, device=device, precision="fp32", desc="scoring",
        passes={"causal": 1, "permutation": N_ORDERS, "pseudo": None}[chosen.likelihood],
    )  # fmt: skip
    for rows, found in results:
        cell, place, gene = found[:, :3].long().numpy().T
        n = rows.stop - rows.start
        total[rows] = np.bincount(cell, weights=found[:, 3].double().numpy(), minlength=n)
        n_genes[rows] = np.bincount(cell, minlength=n)
        places.add(place, gene)
    nats = np.divide(total, n_genes, out=np.full(len(total), np.nan), where=n_genes > 0)
    unigram, by_position = metrics.unigram_nats(places.counts())

    adata = adata.copy() if copy else adata
    adata.obs[key] = np.exp(nats)
    adata.obs[key + _keys.NATS] = nats
    params = {"kind": chosen.likelihood, "key_added": key, "layer": layer}
    if chosen.likelihood == "permutation":
        params["n_orders"] = N_ORDERS
    record_name(adata, "obs", key_added)
    record(
        adata, "perplexity", params, nats=float(total.sum() / max(n_genes.sum(), 1)),
        bound=metrics.permutation_bound(n_genes), unigram=unigram, unigram_by_position=by_position,
    )  # fmt: skip
    remember(adata, chosen)
    return adata if copy else None


class _Places:
    """Number of times that each gene occurs at each position of a token sequence.

    New genes are added to the counts when there are as many of them as counts. The time is then linear in the number of
    genes; adding every batch would make it quadratic.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._counts = sparse.csr_array(shape)
        self._new: list[IntArray] = []
        self._n_new = 0

    def add(self, place: IntArray, gene: IntArray) -> None:
        """Count genes, given the position of each."""
        self._new.append(np.stack([place, gene]).astype(np.int32))
        self._n_new += len(gene)
        if self._n_new >= max(_NEW, self._counts.nnz):
            self.counts()

    def counts(self) -> sparse.csr_array:
        """Return the counts, positions by genes."""
        if self._new:
            place, gene = np.concatenate(self._new, axis=1)
            self._counts = self._counts + sparse.csr_array((np.ones(len(gene)), (place, gene)), self._counts.shape)
            self._new, self._n_new = [], 0
        return self._counts
