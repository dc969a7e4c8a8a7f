"""The model that predicts perturbations: made from a pretrained one, and run with flags of perturbed genes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from scllm._log import details
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.engine.config import Precision
from scllm.engine.objectives import perturbed_flags
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel

__all__ = ["agreement", "decoder_changes", "perturbation_model", "predicted_values"]

# other genes read a flag through attention, at first about one part in the number of genes: with the usual length of 1,
# planted effects that a ridge regression recovers were still not learnt after 240 steps
_FLAG_SCALE = 3.0


def perturbation_model(
    model: CellModel, names: Sequence[str], vectors: FloatArray | None, n_decoders: int
) -> CellModel:
    """Return a model with flags and affine decoders, which has the other weights of ``model``.

    At first it predicts no change: the factors of its decoders are one and the offsets zero.
    """
    n_covariates = 0 if vectors is None else vectors.shape[1]
    config = replace(
        model.config, perturbed=tuple(names), n_decoders=n_decoders, n_covariates=n_covariates, cell_decoder=None,
        explicit_zero_prob=False, n_batches=0, batch_labels=False, domain_norm=False, adversarial=False,
    )  # type: ignore[call-arg]  # fmt: skip
    made = type(model)(config, model.vocab, model.encoder)
    theirs, ours = model.state_dict(), made.state_dict()
    fitting = {
        name: theirs[name]
        for name, weight in ours.items()
        if name in theirs and theirs[name].shape == weight.shape and not name.startswith(("heads.", "coefficients."))
    }
    made.load_state_dict({**ours, **fitting})
    made.trained_on = model.trained_on
    with torch.no_grad():
        nn.init.zeros_(made.flag_embedding.weight[0])
        if "flag_embedding.weight" not in fitting:
            made.flag_embedding.weight.mul_(_FLAG_SCALE)
        for value, decoders in ((1.0, made.coefficients), (0.0, made.offsets)):
            for decoder in decoders:
                nn.init.zeros_(decoder[-1].weight)
                nn.init.constant_(decoder[-1].bias, value)
        if vectors is not None:
            made.covariates.copy_(torch.from_numpy(vectors))
    return made.eval()


def predicted_values(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    rows: IntArray,
    tokens: Sequence[int],
    vector: FloatArray | None = None,
    *,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Iterator[tuple[slice, Tensor]]:
    """Predict the values of all measured genes after a perturbation, ``(1 + n_decoders, b, g)`` for parts of ``rows``.

    The first of them are the values before the perturbation. ``vector`` describes a compound and its dose.
    """
    genes = torch.tensor([list(tokens) or [-1]])
    place = torch.full((len(model.vocab),), -1)
    place[torch.from_numpy(match.measured).long()] = torch.arange(len(match.measured))
    n_genes = len(match.measured)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        where = batch.genes.device
        flags = perturbed_flags(batch, genes.to(where), torch.zeros(batch.n_cells, dtype=torch.long, device=where))
        given = None
        if vector is not None:
            given = torch.as_tensor(vector, dtype=torch.float32, device=where).expand(batch.n_cells, -1)
        found = replica.predict_perturbed(batch, flags, given).float()
        assert batch.values is not None
        found = torch.cat([batch.values[None].float(), found])
        out = found.new_zeros(batch.n_cells, len(found), n_genes)
        at = place.to(where)[batch.genes]
        kept = at >= 0
        out[batch.cell[kept], :, at[kept]] = found[:, kept].T
        return out.flatten(1)

    with details():
        parts = predict(
            model, source, match, forward, rows=rows, batch_size=batch_size, device=device, precision=precision,
            desc="predicting perturbed",
        )  # fmt: skip
        for part, found in parts:
            yield part, found.view(len(found), -1, n_genes).transpose(0, 1)


def decoder_changes(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    rows: IntArray,
    tokens: Sequence[int],
    vector: FloatArray | None = None,
    device: str = "auto",
) -> FloatArray:
    """Return the mean predicted change of each gene by each decoder, ``(n_decoders, g)``."""
    total = np.zeros((model.config.n_decoders, len(match.measured)))  # type: ignore[attr-defined]
    for _, found in predicted_values(model, source, match, rows, tokens, vector, device=device):
        values = found.double().numpy()
        total += (values[1:] - values[0]).sum(1)
    return total / len(rows)


def agreement(changes: FloatArray) -> float:
    """Return how far decoders agree on a change ``(n_decoders, g)``: the share of its square that is common, 0 to 1.

    NaN for one decoder, which cannot disagree.
    """
    if len(changes) < 2:
        return float("nan")
    common = (changes.mean(0) ** 2).sum()
    spread = changes.var(0, ddof=1).sum()
    return float(common / (common + spread)) if common + spread > 0 else 0.0
