"""Expression of spots from features of the histology image around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scllm.data.encode import Encoder, ValueEncoder
from scllm.data.vocab import Vocab
from scllm.models.base import Batch, CellModel, ModelConfig
from scllm.models.entries import entry
from scllm.models.image_encoders import SmallCNN

__all__ = ["FINETUNE", "PRETRAIN", "SIZES", "Config", "Likelihood", "Model"]

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 64, "n_heads": 1},
    "small": {"d_model": 128, "n_heads": 1},
    "base": {},
}

FINETUNE: dict[str, Any] = {"epochs": 60, "batch_size": 32, "lr": 1e-3}
PRETRAIN = FINETUNE  # never used: the family is trained by tl.fit_spatial alone

_FARTHEST = 10.0  # standard deviations to which features are clipped

Likelihood = Literal["mse", "nb"]


@dataclass(frozen=True)
class Config(ModelConfig):
    """Architecture of the predictor.

    Parameters
    ----------
    n_layers
        Number of hidden layers.
    d_model
        Width of the hidden layers.
    d_features
        Number of image features of a spot.
    use_rep
        Key of ``obsm`` with the features; ``None``: the model reads pixels.
    n_neighbors
        Number of nearest spots whose mean features are read beside those of the spot; 0 for none.
    likelihood
        ``"mse"``: squared error of log-normalised expression. ``"nb"``: negative binomial likelihood of counts.
    is_counts
        Whether the model was trained on counts, which it log-normalised.
    pixels
        Edge of the patches that the model reads, if it reads pixels.
    """

    n_layers: int = 1
    n_heads: int = 1
    d_model: int = 256
    dropout: float = 0.2
    d_features: int = 512
    use_rep: str | None = "X_patch"
    n_neighbors: int = 6
    likelihood: Likelihood = "mse"
    is_counts: bool = True
    pixels: int = 112

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.likelihood not in ("mse", "nb"):
            raise ValueError(f"Expected likelihood to be 'mse' or 'nb', got {self.likelihood!r}. Pass one of them.")

    def objective(self) -> dict[str, Any]:
        """Raise, because the model is not pretrained."""
        raise ValueError("Models of the family 'spatial' are trained by tl.fit_spatial, not by tl.pretrain. Use that.")

    def encoder(self) -> Encoder:
        """Return how the expression that is predicted was normalised."""
        return ValueEncoder()

    def vocab(self, genes: Any) -> Vocab:
        """Make a vocabulary of the predicted genes."""
        return Vocab.from_genes(genes)


class Model(CellModel):
    """A multilayer perceptron on the features of a spot and the mean features of its nearest spots.

    Features are standardised with the mean and standard deviation of the training spots. The last layer begins at the
    mean expression of the training spots.
    """

    family = "spatial"
    reads_expression = reads_genes = False
    poolings = ()

    def __init__(self, config: Config, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        self.config: Config = config
        d, n_genes = config.d_features, len(vocab.genes)
        self.image_encoder = SmallCNN(d) if config.use_rep is None else None
        self.register_buffer("feature_mean", torch.zeros(d))
        self.register_buffer("feature_scale", torch.ones(d))
        widths = [d * (2 if config.n_neighbors else 1), *[config.d_model] * config.n_layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.drop = nn.Dropout(config.dropout)
        self.out = nn.Linear(widths[-1], n_genes)
        nn.init.normal_(self.out.weight, std=0.01)
        # logarithm of the inverse dispersion of each gene's counts
        self.log_theta = nn.Parameter(torch.zeros(n_genes)) if config.likelihood == "nb" else None

    feature_mean: Tensor
    feature_scale: Tensor

    @property
    def blocks(self) -> Sequence[Any]:
        """None: the model is no transformer."""
        return []

    @entry
    def expression(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Predict log-normalised expression, ``(b, d)`` twice to ``(b, g)``.

        With counts this is ``log1p`` of the expected count per 10,000.
        """
        x = self._standardised(features)
        if self.config.n_neighbors:
            assert context is not None
            x = torch.cat([x, self._standardised(context)], dim=1)
        for layer in self.layers:
            x = self.drop(F.gelu(layer(x)))
        found = self.out(x)
        return F.softplus(found) if self.log_theta is not None else found

    def _standardised(self, features: Tensor) -> Tensor:
        # a feature that hardly varies in training may be far away elsewhere
        return ((features - self.feature_mean) / self.feature_scale).clamp(-_FARTHEST, _FARTHEST)

    def standardise_as(self, features: Tensor) -> None:
        """Take mean and standard deviation from the features of the training spots, ``(n, d)``."""
        self.feature_mean.copy_(features.mean(0))
        scale = features.std(0).nan_to_num(0.0)
        # constant features become zero, everywhere
        self.feature_scale.copy_(scale.masked_fill(scale <= 1e-6 * features.abs().amax(0), torch.inf))

    def begin_at(self, mean: Tensor) -> None:
        """Begin at the mean expression of the training spots, ``(g,)``."""
        with torch.no_grad():
            begin = torch.expm1(mean.clamp(min=1e-3)).log() if self.log_theta is not None else mean
            self.out.bias.copy_(begin)

    def prediction_loss(self, predicted: Tensor, truth: Tensor, total: Tensor | None) -> Tensor:
        """Compute the loss of each spot, ``(b,)``: mean over genes.

        Parameters
        ----------
        predicted
            Predicted expression, ``(b, g)``.
        truth
            Log-normalised expression, or counts with likelihood ``"nb"``, ``(b, g)``.
        total
            Counts of each spot over all genes, ``(b,)``, for likelihood ``"nb"``.
        """
        if self.log_theta is None:
            return ((predicted - truth) ** 2).mean(1)
        assert total is not None
        mean = torch.expm1(predicted).clamp(min=1e-6) * (total[:, None] / 1e4)
        theta = self.log_theta.exp()
        log_sum = (theta + mean).log()
        likelihood = (
            torch.lgamma(truth + theta) - torch.lgamma(theta) - torch.lgamma(truth + 1)
            + theta * (self.log_theta - log_sum) + truth * (mean.log() - log_sum)
        )  # fmt: skip
        return -likelihood.mean(1)

    def inputs(self, batch: Batch) -> Tensor:
        """Raise, because the model reads images and not genes."""
        self._reads_images()

    def forward(self, batch: Batch) -> Any:
        """Raise, because the model reads images and not genes."""
        self._reads_images()

    def gene_table(self) -> Tensor:
        """Raise, because the model reads images and not genes."""
        self._reads_images()

    @staticmethod
    def _reads_images() -> NoReturn:
        raise ValueError(
            "Expected a model that reads genes, got a spatial model, which reads image features. Use "
            "tl.predict_spatial, or pass a model of another family."
        )
