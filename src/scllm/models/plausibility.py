"""Plausibility of predicted expression under a frozen gene language model, as a loss term of any training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scllm._names import listed
from scllm._typing import FloatArray
from scllm.data.encode import RankEncoder, ValueEncoder
from scllm.data.tokens import Tokens
from scllm.models.base import Batch, CellModel
from scllm.models.gene_lm import GeneLM
from scllm.models.soft_ranks import ranked
from scllm.models.storage import HUB

__all__ = ["GaussianPrior", "Plausibility", "PlausibilityKind"]

PlausibilityKind = Literal["feature", "match", "nll", "masked"]

_FAMILIES = ("gpt2", "albert", "xlnet", "scgpt")
_ENCODER = "encoder=scllm.models.ValueEncoder(max_len=1001, target_sum=None)"


class Plausibility(nn.Module):
    """Score how plausible predicted expression is under a frozen gene language model.

    Add it to the loss of any model that predicts expression: it is differentiable with respect to the prediction. How
    expression enters the language model follows from its family:

    - **values** (scgpt with a :class:`ValueEncoder`): the genes are fixed, and the predicted values are its input.
    - **ranks** (gpt2, xlnet, albert): genes are ordered by predicted expression with SoftSort (Prillo and Eisenschlos,
      *ICML* 2020). The sequence of genes is the exact one; gradients are those of the relaxed order with temperature
      ``tau`` (straight-through).

    Parameters
    ----------
    lm
        The gene language model or its path. It is copied and frozen.
    kind
        What the loss of a spot is:

        - ``"feature"``: squared distance between the language model's hidden states for predicted and true expression.
        - ``"match"``: by how much the negative log-likelihood of the prediction differs from that of the truth, beyond
          ``margin``.
        - ``"nll"``: the negative log-likelihood, in nats per gene. On its own, it pulls every prediction towards the
          most typical profile.
        - ``"masked"``: squared error of genes that the language model predicts from the others (scgpt only; for scgpt,
          ``"nll"`` is the same).
    genes
        Names of the columns of the prediction. ``None``: the genes of the language model, in their order. Columns
        that it does not know are ignored.
    top_k
        Number of genes of a spot that are read: those with the highest values (ranks), or a random subset that changes
        from call to call in training mode (values).
    tau
        Temperature of SoftSort, in units of the predicted values. It can be changed during training.
    margin
        Difference of likelihoods that ``"match"`` accepts.
    mask_ratio
        Share of genes that are hidden (values, for all kinds but ``"feature"``).
    random_state
        Seed for hidden genes, random subsets and prediction orders.

    Notes
    -----
    ``forward(predicted, truth=None)`` takes log-normalised values, ``(n_spots, n_genes)``, and returns one loss per
    spot, ``(n_spots,)``. Values enter scgpt as they are, so train it on values that are normalised like the predicted
    ones, with ``ValueEncoder(target_sum=None)``; otherwise the encoder normalises to the genes of its vocabulary.
    ``"feature"`` and ``"match"`` need the truth.

    A predicted profile is hardly ever exactly 0, while language models that order genes learn from expressed genes
    alone. With ``truth``, they therefore read as many of the highest predicted genes of a spot as the truth expresses
    (values above 0), so that both sequences have the same length; predicted values of 0 or less are read too if the
    truth expresses more genes than are predicted above 0. Without it, they read the genes with a predicted value above
    0. In both cases they read ``top_k`` genes at most. scgpt reads the same genes of both, zeros included. If the
    language model orders genes by count / median, values are divided by the medians too. gpt2 scores each gene from the
    genes with higher values, xlnet in one random order per call, and albert in ``n_folds = 4`` parts, each from the
    others.

    Examples
    --------
    >>> lm = scllm.models.build("gpt2", vocab=["CD3D", "CD19", "LYZ"], size="tiny")
    >>> term = Plausibility(lm, kind="nll")
    >>> term(torch.tensor([[0.5, 2.0, 1.0]])).shape
    torch.Size([1])
    """

    n_folds = 4

    def __init__(
        self,
        lm: CellModel | str | PathLike[str],
        *,
        kind: PlausibilityKind = "feature",
        genes: Iterable[str] | None = None,
        top_k: int = 256,
        tau: float = 1.0,
        margin: float = 0.0,
        mask_ratio: float = 0.3,
        random_state: int = 0,
    ) -> None:
        super().__init__()
        lm = _loaded(lm)
        _check(lm, kind, top_k, tau, margin, mask_ratio)
        self.lm = copy.deepcopy(lm).requires_grad_(False).eval()
        self.kind, self.top_k, self.tau, self.margin, self.mask_ratio = kind, top_k, tau, margin, mask_ratio
        self.random_state, self.n_calls = random_state, 0
        names = list(lm.vocab.genes) if genes is None else list(genes)
        self.n_columns = len(names)
        ids = np.asarray(lm.vocab.ids(names))
        columns = np.flatnonzero(ids >= 0)
        medians = _medians(lm, ids)
        columns = columns[np.isfinite(medians[columns])]
        if len(columns) < 2:
            raise ValueError(
                f"Expected at least 2 genes that the language model knows, got {len(columns)} of {len(names)} (first: "
                f"{listed(names)}; the model has {listed(lm.vocab.genes)}). Pass the names of the predicted genes as "
                "genes=, spelled as in the model's vocabulary."
            )
        # ascending token ids, because ties are ordered by them
        columns = columns[np.argsort(ids[columns], kind="stable")]
        self.register_buffer("columns", torch.from_numpy(columns), persistent=False)
        self.register_buffer("tokens", torch.from_numpy(ids[columns].astype(np.int64)), persistent=False)
        self.register_buffer("medians", torch.from_numpy(medians[columns].astype(np.float32)), persistent=False)

    columns: Tensor
    tokens: Tensor
    medians: Tensor

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the language model stays in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def forward(self, predicted: Tensor, truth: Tensor | None = None) -> Tensor:
        """Compute the loss of each spot, ``(n_spots, n_genes)`` to ``(n_spots,)``."""
        self._check_input(predicted, truth)
        seed = self.random_state + (self.n_calls if self.training else 0)
        self.n_calls += self.training
        draws = torch.Generator().manual_seed(seed)
        score = self._by_ranks if isinstance(self.lm, GeneLM) else self._by_values
        return score(predicted[:, self.columns], None if truth is None else truth[:, self.columns], draws)

    def _check_input(self, predicted: Tensor, truth: Tensor | None) -> None:
        if predicted.ndim != 2 or predicted.shape[1] != self.n_columns:
            raise ValueError(
                f"Expected predicted expression of shape (n_spots, {self.n_columns}), one column per gene, got "
                f"{tuple(predicted.shape)}. Pass the names of its columns as genes=."
            )
        if truth is None and self.kind in ("feature", "match"):
            raise ValueError(f"Expected the true expression for kind={self.kind!r}, got None. Pass truth=.")
        if truth is not None and truth.shape != predicted.shape:
            raise ValueError(
                f"Expected truth of the shape of the prediction, {tuple(predicted.shape)}, got {tuple(truth.shape)}. "
                "Pass the same genes in the same order."
            )

    # --- ranks: gpt2, albert, xlnet ---

    def _by_ranks(self, predicted: Tensor, truth: Tensor | None, draws: torch.Generator) -> Tensor:
        order = torch.rand(self._n_read(), generator=draws)
        # language models learn from sequences of expressed genes, and few predictions are exactly 0
        n_read = ((predicted if truth is None else truth) > 0).sum(1)
        if self.kind == "feature":
            assert truth is not None
            with torch.no_grad():
                aim = self._mean_state(truth, n_read)
            return ((self._mean_state(predicted, n_read) - aim) ** 2).mean(1)
        found = self._nats(predicted, n_read, order)
        return self._matched(found, truth, lambda values: self._nats(values, n_read, order))

    def _matched(self, found: Tensor, truth: Tensor | None, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Compare the score of the prediction with that of the truth, for kind ``"match"``."""
        if self.kind != "match":
            return found
        assert truth is not None
        with torch.no_grad():
            aim = score(truth)
        return F.relu((found - aim).abs() - self.margin)

    def _n_read(self) -> int:
        room = self.lm.encoder.max_len - self.lm.encoder.n_specials
        return min(self.top_k, len(self.columns), room)

    def _sequence(self, values: Tensor, n_read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which gene is where ``(b, k, g)``, the embeddings with ``<cls>`` ``(b, k + 1, e)``, and padding."""
        lm = cast(GeneLM, self.lm)
        gene_at, is_read = ranked(self._strength(values), self._n_read(), self.tau, n_read=n_read)
        table = lm.gene_table()
        x = gene_at @ table[self.tokens].to(gene_at.dtype)
        cls = table[lm.vocab.cls_id].expand(len(x), 1, -1)
        padding = F.pad(~is_read, (1, 0))
        return gene_at, torch.cat([cls.to(x.dtype), x], dim=1), padding

    def _strength(self, values: Tensor) -> Tensor:
        """Return what genes are ordered by: their values, divided by the medians if the language model does so."""
        if getattr(self.lm.encoder, "medians", None) is None:
            return values
        divided = torch.log1p(torch.expm1(values.clamp(min=0)) / self.medians)
        # predictions below 0 stay below those above it
        return torch.where(values > 0, divided, values)

    def _mean_state(self, values: Tensor, n_read: Tensor) -> Tensor:
        """Compute the mean hidden state of a spot's genes, ``(b, d)``."""
        _, x, padding = self._sequence(values, n_read)
        states = cast(GeneLM, self.lm).on_embeddings(x, padding, logits=False)[:, 1:]
        there = (~padding[:, 1:]).to(states.dtype)
        return (states * there[:, :, None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)

    def _nats(self, values: Tensor, n_read: Tensor, draws: Tensor) -> Tensor:
        """Compute the negative log-likelihood of the sequence in nats per gene, ``(b,)``."""
        gene_at, x, padding = self._sequence(values, n_read)
        lm = cast(GeneLM, self.lm)
        match lm.likelihood:
            case "causal":
                logits = lm.on_embeddings(x, padding, logits=True)[:, :-1]
            case "permutation":
                logits = self._permuted(lm, x, padding, draws)
            case _:
                logits = self._folded(lm, x, padding)
        likely = logits.log_softmax(2)[:, :, self.tokens]
        nats = -(gene_at * likely).sum(2)
        there = (~padding[:, 1:]).to(nats.dtype)
        return (nats * there).sum(1) / there.sum(1).clamp(min=1)

    def _permuted(self, lm: GeneLM, x: Tensor, padding: Tensor, draws: Tensor) -> Tensor:
        """Predict each gene from ``<cls>`` and the genes with smaller draws, at its own position."""
        turn = F.pad(draws.argsort().argsort() + 1, (1, 0)).to(x.device)
        unseen = (turn[None, :] >= turn[:, None]).to(x.dtype).expand(len(x), -1, -1)
        wanted = torch.eye(len(turn), device=x.device, dtype=x.dtype)[1:].expand(len(x), -1, -1)
        return lm.on_embeddings(x, padding, logits=True, perm_mask=unseen, target_mapping=wanted)

    def _folded(self, lm: GeneLM, x: Tensor, padding: Tensor) -> Tensor:
        """Predict the genes of each of a few interleaved parts, masked together, from those of the others."""
        place = torch.arange(x.shape[1] - 1, device=x.device)
        mask = lm.gene_table()[lm.vocab.mask_id].to(x.dtype)
        found: Tensor | None = None
        for fold in range(self.n_folds):
            hidden = F.pad(place % self.n_folds == fold, (1, 0))[None, :, None]
            logits = lm.on_embeddings(torch.where(hidden, mask, x), padding, logits=True)
            found = logits if found is None else torch.where(hidden, logits, found)
        assert found is not None
        return found[:, 1:]

    # --- values: scgpt ---

    def _by_values(self, predicted: Tensor, truth: Tensor | None, draws: torch.Generator) -> Tensor:
        read = torch.randperm(len(self.tokens), generator=draws)[: self._n_read()].sort().values.to(predicted.device)
        predicted, truth = predicted[:, read], None if truth is None else truth[:, read]
        tokens = self.tokens[read]
        if self.kind == "feature":
            assert truth is not None
            with torch.no_grad():
                aim = self._value_states(tokens, truth)
            return ((self._value_states(tokens, predicted) - aim) ** 2).mean((1, 2))
        n_hidden = max(1, round(self.mask_ratio * len(read)))
        hidden = torch.randperm(len(read), generator=draws)[:n_hidden].to(predicted.device)
        found = self._hidden_error(tokens, predicted, hidden)
        return self._matched(found, truth, lambda values: self._hidden_error(tokens, values, hidden))

    def _value_batch(self, tokens: Tensor, values: Tensor) -> Batch:
        b, g = values.shape
        encoder = cast(ValueEncoder, self.lm.encoder)
        n_specials = encoder.n_specials
        genes = F.pad(tokens, (n_specials, 0), value=self.lm.vocab.cls_id if n_specials else 0)
        full = F.pad(values, (n_specials, 0), value=float(encoder.cls_value or 0))
        indptr = np.arange(b + 1) * (g + n_specials)
        empty = Tokens(indptr, np.zeros(indptr[-1], np.int32), None)
        batch = Batch.from_tokens(empty).to(values.device)
        return batch.with_genes(genes.repeat(b)).with_values(full.flatten())

    def _value_states(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Compute the hidden state of each gene, ``(b, g, d)``."""
        states = self.lm.hidden(self._value_batch(tokens, values))
        return states.view(len(values), -1, states.shape[1])[:, self.lm.encoder.n_specials :]

    def _hidden_error(self, tokens: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """Compute the mean squared error of hidden genes that are predicted from the others, ``(b,)``."""
        lm: Any = self.lm
        shown = values.index_fill(1, hidden, float(lm.config.mask_value))
        batch = self._value_batch(tokens, shown)
        states = self._value_states(tokens, shown)[:, hidden]
        cell_of = torch.arange(len(values), device=values.device).repeat_interleave(len(hidden))
        decoded = lm.decode(states.flatten(0, 1), cell_of, batch)["value"].view(len(values), -1)
        return ((decoded - values[:, hidden]) ** 2).mean(1)


class GaussianPrior(nn.Module):
    """Negative log-density of predicted expression under a Gaussian with shrunken covariance, up to a constant.

    This is the simplest prior on expression profiles, against which a language model has to prove itself. The
    covariance is the estimate of Ledoit and Wolf (*J. Multivar. Anal.* 2004).
    """

    def __init__(self, expression: FloatArray) -> None:
        super().__init__()
        from sklearn.covariance import LedoitWolf

        fitted = LedoitWolf().fit(np.asarray(expression, np.float64))
        self.register_buffer("mean", torch.from_numpy(fitted.location_.astype(np.float32)), persistent=False)
        self.register_buffer("precision", torch.from_numpy(fitted.precision_.astype(np.float32)), persistent=False)

    mean: Tensor
    precision: Tensor

    def forward(self, predicted: Tensor, truth: Tensor | None = None) -> Tensor:
        """Compute half the squared Mahalanobis distance per gene, ``(n_spots, n_genes)`` to ``(n_spots,)``."""
        del truth
        away = predicted - self.mean
        return 0.5 * ((away @ self.precision) * away).mean(1)


def _loaded(lm: CellModel | str | PathLike[str]) -> CellModel:
    if isinstance(lm, CellModel):
        return lm
    if not isinstance(lm, (str, PathLike)) or str(lm) == HUB:
        raise TypeError(
            f"Expected lm to be a gene language model or its path, got an object of type {type(lm).__name__}. Pretrain "
            "'gpt2', 'albert', 'xlnet' or 'scgpt'."
        )
    if str(lm) in _FAMILIES and not Path(lm).exists():
        raise ValueError(
            f"Expected lm to be a trained gene language model or its path, got the name of a family, {str(lm)!r}. "
            f"Train one with scllm.tl.pretrain(adata, {str(lm)!r}), and pass it."
        )
    from scllm.models import load  # this module is imported by scllm.models

    return load(lm)


def _check(lm: CellModel, kind: str, top_k: int, tau: float, margin: float, mask_ratio: float) -> None:
    if kind not in get_args(PlausibilityKind):
        raise ValueError(f"Expected kind to be one of {get_args(PlausibilityKind)}, got {kind!r}. Pass one of them.")
    if top_k < 2 or not tau > 0 or margin < 0 or not 0 < mask_ratio < 1:
        raise ValueError(
            "Expected top_k of at least 2, tau above 0, margin of at least 0 and mask_ratio between 0 and 1, got "
            f"top_k={top_k}, tau={tau}, margin={margin} and mask_ratio={mask_ratio}. Correct them."
        )
    if isinstance(lm, GeneLM):
        if kind == "masked":
            raise ValueError(
                f"Expected an scgpt model for kind='masked', which hides values, got a {lm.family} model, which reads "
                "the order of genes. Pass kind='nll'."
            )
        return
    if lm.family != "scgpt":
        raise ValueError(
            f"Expected lm to be of the family 'gpt2', 'albert', 'xlnet' or 'scgpt', got a {lm.family} model. Pretrain "
            "one of these."
        )
    if not isinstance(lm.encoder, ValueEncoder) or getattr(lm.config, "value_style", None) == "category":
        raise ValueError(
            "Expected an scgpt model that reads log-normalised values, because predictions are such values, got one "
            f"with {type(lm.encoder).__name__}. Train one with {_ENCODER}."
        )
    if not lm.encoder.include_zeros:
        raise ValueError(
            "Expected an scgpt model that reads genes without a count, because measured spots have many of them, got "
            f"one with include_zeros=False. Train one with {_ENCODER}, whose default is include_zeros=True."
        )


def _medians(lm: CellModel, ids: np.ndarray) -> FloatArray:
    """Return the median of each column's gene, if the encoder divides by medians; otherwise 1."""
    medians = lm.encoder.medians if isinstance(lm.encoder, RankEncoder) else None
    return np.ones(len(ids)) if medians is None else np.where(ids >= 0, medians[ids], np.nan)
