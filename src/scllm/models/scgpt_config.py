"""Settings of scGPT's architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from scllm.data.encode import BinEncoder, Encoder, ValueEncoder
from scllm.models.base import ModelConfig
from scllm.models.layers import CellDecoder

__all__ = ["Config"]

ValueStyle = Literal["continuous", "category", "scaling"]


@dataclass(frozen=True)
class Config(ModelConfig):
    """Architecture of scGPT; defaults are those of the published whole-human model.

    Parameters
    ----------
    d_hidden
        Width of the feed-forward layers.
    value_style
        How values are embedded: by a small network (``"continuous"``), by a table of bins (``"category"``), or as a
        factor of the gene embedding (``"scaling"``).
    n_value_bins
        Rows of the table of bins, including the one for masked values (``"category"`` only).
    mask_value
        Value that replaces a masked one.
    cell_decoder
        How expression is predicted from the cell embedding (MVC in the original). ``None``: not at all.
    explicit_zero_prob
        Whether a second head predicts the probability that a gene is zero.
    n_batches
        Number of experimental batches; 0 for none.
    batch_labels
        Whether the decoders read the batch.
    domain_norm
        Whether inputs are normalised within each batch (DSBN in the original).
    adversarial
        Whether an adversarial head predicts the batch from the cell embedding (DAB in the original).
    class_layers
        Number of layers of a published classification head.
    pooled_skip
        Whether ``<cls>`` starts from the normalised mean of the cell's gene embeddings, weighted by their values, in
        addition to its own embedding. Cell embeddings then learn faster. Published models do not have it.
    perturbed
        Names of the perturbations that the model was trained on; empty for models that predict no perturbations. Such a
        model reads a flag of each gene, and predicts expression after a perturbation by an affine function of that
        before (``TransformerGenerator`` in the original).
    n_decoders
        Number of affine decoders of an ensemble (1 in the original).
    n_covariates
        Length of the vector that describes a compound and its dose; 0 for perturbed genes.
    """

    dropout: float = 0.2
    d_hidden: int = 512
    value_style: ValueStyle = "continuous"
    n_value_bins: int = 52
    mask_value: int = -1
    cell_decoder: CellDecoder | None = "inner product"
    explicit_zero_prob: bool = False
    n_batches: int = 0
    batch_labels: bool = False
    domain_norm: bool = False
    adversarial: bool = False
    class_layers: int = 3
    pooled_skip: bool = False
    perturbed: tuple[str, ...] = ()
    n_decoders: int = 1
    n_covariates: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "perturbed", tuple(self.perturbed))
        if (self.batch_labels or self.domain_norm or self.adversarial) and self.n_batches < 1:
            raise ValueError(
                "Expected n_batches of at least 1 with batch_labels, domain_norm or adversarial, got "
                f"{self.n_batches}. Pass the number of batches."
            )
        if self.value_style == "category" and not 0 <= self.mask_value < self.n_value_bins:
            # the table has no row -1, so the row after the bins is for masked values
            object.__setattr__(self, "mask_value", self.n_value_bins - 1)

    def objective(self) -> dict[str, Any]:
        """Return the default pretraining objective."""
        return {"kind": "MaskedValue", "mask_ratio": (0.25, 0.5, 0.75), "from_cell": 1.0}

    def encoder(self) -> Encoder:
        """Return the default encoder, which turns counts into token sequences."""
        if self.value_style == "scaling":
            return ValueEncoder(max_len=1201, include_zeros=False)
        return BinEncoder()
