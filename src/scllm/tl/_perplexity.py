"""How plausible each cell's sentence of genes is to a language model."""

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
from scllm.data.source import open_source
from scllm.engine.likelihood import N_ORDERS, gene_nats
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve

__all__ = ["perplexity"]

# logits held at once where the caller leaves the batch size open: a gigabyte
_LOGITS = 2**28
_CELLS = 64
# genes kept one by one before they are counted
_NEW = 2**20


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
    """Score how plausible each cell is to a gene language model.

    A cell is its genes by falling expression. The score is minus the mean logarithm of each gene's probability in its
    place, in nats per gene, and its exponential, the perplexity: among how many equally likely genes the model
    hesitates. What a gene is predicted from is the *kind*, and numbers of different kinds do not compare:

    - ``"causal"`` (gpt2): the genes expressed more highly. The chain rule makes this the exact likelihood.
    - ``"permutation"`` (xlnet): the genes before it in an order; the mean over four fixed random orders, each of which
      gives an exact likelihood.
    - ``"pseudo"`` (albert, and any masked model): all other genes, each gene hidden in turn. It is the likelihood of
      nothing, and lower: all that is left to guess is one gene.

    Always computed in fp32.

    Parameters
    ----------
    adata
        Cells by genes; counts.
    model
        A gene language model or its path; ``None`` is the one recorded on ``adata`` last.
    key_added
        Column to write.
    layer
        Layer to read; ``None`` is ``X``.
    batch_size
        Cells of one forward pass; changes speed and memory only.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    copy
        Return a changed copy in place of changing ``adata``.

    Writes
    ------
    ``adata.obs[key_added]``, ``adata.obs[key_added + "_nats"]``
        Perplexity of each cell and its logarithm, nats per gene; NaN for a cell without genes.
    ``adata.uns["scllm"]["perplexity"]``
        ``params`` (with the ``kind``) and, in nats per gene over all cells: ``nats``, the model's own; ``bound``,
        ``ln(n!) / n``, below which no likelihood can be where the order of a cell's ``n`` genes is random (real orders
        are not); ``unigram``, of a model that knows how frequent each gene is; ``unigram_by_position``, of one that
        knows it for each place in the sentence. Both are those of ``adata``, each gene left out in turn.

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
    source = open_source(adata, layer=layer)
    check_layer(source, chosen, layer, adata)
    match = gene_match(adata, source, chosen)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        at, nats = gene_nats(replica, batch)
        cell = batch.cell[at]
        # cell, place and gene travel beside the nats, so that one array comes back
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
    """How often each gene stands in each place of a sentence.

    New genes are added to the counts once they are as many as the counts: time then grows with the genes, where adding
    every batch takes the square of it.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._counts = sparse.csr_array(shape)
        self._new: list[IntArray] = []
        self._n_new = 0

    def add(self, place: IntArray, gene: IntArray) -> None:
        """Count genes that stand in places."""
        self._new.append(np.stack([place, gene]).astype(np.int32))
        self._n_new += len(gene)
        if self._n_new >= max(_NEW, self._counts.nnz):
            self.counts()

    def counts(self) -> sparse.csr_array:
        """Places by genes."""
        if self._new:
            place, gene = np.concatenate(self._new, axis=1)
            self._counts = self._counts + sparse.csr_array((np.ones(len(gene)), (place, gene)), self._counts.shape)
            self._new, self._n_new = [], 0
        return self._counts
