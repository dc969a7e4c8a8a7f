"""One held-out group of a comparison: training each arm on the other groups, and scoring its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import nn

from scllm import _keys, metrics, models
from scllm._checks import embedding
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.encode import ValueEncoder
from scllm.data.spots import nearest_spots, spatial_blocks, spot_graph, spot_positions
from scllm.data.targets import dense, normalised
from scllm.engine.config import TrainConfig
from scllm.models.base import CellModel
from scllm.models.plausibility import GaussianPrior, Plausibility
from scllm.tl._evaluate_spatial import LikelihoodScores, morans_i, section_scores, summary
from scllm.tl._fit_spatial import fit_spatial
from scllm.tl._predict_spatial import predict_spatial
from scllm.tl._pretrain import pretrain
from scllm.tl._spatial_baselines import knn_prediction, mean_prediction, ridge_prediction
from scllm.tl._spatial_inputs import expression_source

__all__ = ["BASELINES", "NO_LM", "Fit", "Fold", "SpotData"]

BASELINES = ("mean", "ridge", "knn")
NO_LM = ("none", "gaussian")
_BLOCKS = 8  # contiguous blocks of a section that are resampled
# a few hundred spots are few steps: gpt2 of size "tiny", trained for 20 epochs on 392 simulated spots, has 4.18 nats
# per gene on a held-out section, 4.26 with a learning rate of 1e-3 or 1e-2, 4.25 with batches of 32, and 4.47 with the
# defaults of tl.pretrain (python -m benchmarks.spatial_her2st FOLDER --settings)
_LM_LR, _LM_BATCH = 3e-3, 16
_INNER = 4  # blocks of the inner cross-validation with one training section


@dataclass(frozen=True)
class SpotData:
    """Expression, features with those of the neighbours, and positions."""

    target: CSR
    names: list[str]
    inputs: FloatArray | None
    xy: FloatArray
    group: pd.Series

    @classmethod
    def read(
        cls,
        adata: AnnData,
        layer: str | None,
        names: list[str],
        use_rep: str | None,
        n_neighbors: int,
        group: pd.Series,
    ) -> SpotData:
        source = expression_source(adata, layer)
        target = normalised(source, np.arange(source.n_obs))
        xy = spot_positions(adata.obsm, adata.obs_names)
        if use_rep is None:
            return cls(target, names, None, xy, group)
        advice = "Call scllm.tl.embed_patches(adata) first, or pass the key of image features as use_rep=."
        features = np.asarray(embedding(adata, use_rep, advice=advice), np.float32)
        if n_neighbors:
            near = nearest_spots(xy, group, n_neighbors)
            features = np.hstack([features, features[near].mean(axis=1)])
        return cls(target, names, features, xy, group)


@dataclass(frozen=True)
class Fit:
    """The scores of one arm for one held-out section."""

    n_train: int
    arm: str
    held_out: str
    seed: int
    scores: dict[str, float]
    samples: FloatArray
    """Correlation and error of gene-gene correlations: of the section as it is, then of bootstrap samples."""


@dataclass
class Fold:
    """One held-out section."""

    adata: AnnData
    data: SpotData
    given: str | CellModel
    train_names: list[str]
    held_out: str
    options: Mapping[str, Any]
    pretraining: Mapping[str, Any]
    folder: Path
    n_top_genes: int | None
    uses_lm: bool
    seed: int

    @cached_property
    def train(self) -> IntArray:
        """Rows of the training spots."""
        return np.flatnonzero(self.data.group.isin(self.train_names))

    @cached_property
    def test(self) -> IntArray:
        """Rows of the held-out spots."""
        return np.flatnonzero(self.data.group == self.held_out)

    @cached_property
    def genes(self) -> list[str]:
        """Genes to predict, chosen on the training sections."""
        if self.n_top_genes is None:
            return self.data.names
        names, data = np.array(self.data.names, dtype=object), self.data
        graph = spot_graph(data.xy[self.train], data.group.iloc[self.train])
        score = morans_i(graph, data.target[self.train][:, self.adata.var_names.get_indexer(names)])
        varies = np.flatnonzero(np.isfinite(score))
        return names[np.sort(varies[np.argsort(-score[varies], kind="stable")[: self.n_top_genes]])].tolist()

    def expression(self, spots: IntArray) -> FloatArray:
        """Return the expression of the genes to predict, ``(n, g)``."""
        return dense(self.data.target[spots], self.adata.var_names.get_indexer(self.genes))

    def fit(
        self, n_train: int, arm: str, seed: int, gene_sets: Mapping[str, Sequence[str]] | None, n_resamples: int
    ) -> Fit:
        """Train one arm and score its predictions of the held-out section."""
        guess, truth, xy = self._predicted(arm, self.seed + seed), self.expression(self.test), self.data.xy[self.test]
        places = {name: pd.Index(self.genes).get_indexer(list(names)) for name, names in (gene_sets or {}).items()}
        sets = {name: at[at >= 0] for name, at in places.items() if (at >= 0).sum() > 1}
        graph = spot_graph(xy, pd.Series("", index=range(len(xy))))
        scores = summary(truth, guess, section_scores(truth, guess, graph), sets)
        if self.uses_lm:
            scores |= self._judge(truth, guess)
        # the same samples for every arm and seed, so that differences are paired
        rng = np.random.default_rng(self.seed)
        drawn = [np.arange(len(xy)), *(_resampled(xy, rng) for _ in range(n_resamples))]
        samples = np.array([_two_scores(truth[rows], guess[rows]) for rows in drawn])
        return Fit(n_train, arm, self.held_out, seed, scores, samples)

    def _predicted(self, arm: str, seed: int) -> FloatArray:
        """Predict the held-out spots with one arm."""
        train, test, inputs = self.train, self.test, self.data.inputs
        if arm == "mean":
            return mean_prediction(self.expression(train), len(test))
        if arm in BASELINES:
            assert inputs is not None
            baseline = ridge_prediction if arm == "ridge" else knn_prediction
            return baseline(inputs[train], self.expression(train), self._inner(), inputs[test])[0]
        model = fit_spatial(
            self._part(train),
            lm=cast(Any, self._term(arm, seed)),
            genes=self.genes,
            run_dir=self._run(f"{self.options['use_rep'] or 'pixels'}-{self._named(arm)}", seed),
            random_state=seed,
            **self.options,
        )
        held_out = self._part(test)
        predict_spatial(held_out, model, library_key=self.options["library_key"], device=self.options["device"])
        return held_out.layers[_keys.PREDICTED][:, held_out.var_names.get_indexer(self.genes)]

    def _part(self, spots: IntArray) -> AnnData:
        """Copy some spots, with the images of their sections alone."""
        uns, part = self.adata.uns, self.adata[spots]
        there = set(self.data.group.iloc[spots])
        kept = {"scllm": dict(uns["scllm"])} if "scllm" in uns else {}
        if _keys.SPATIAL in uns:
            kept[_keys.SPATIAL] = {name: one for name, one in uns[_keys.SPATIAL].items() if name in there}
        return AnnData(
            part.X, obs=part.obs.copy(), var=part.var.copy(), obsm=dict(part.obsm), layers=dict(part.layers), uns=kept
        )

    def _run(self, what: str, seed: int) -> Path:
        """Return the folder of one training."""
        return (
            self.folder / f"{'+'.join(sorted(self.train_names))}-{self.held_out}".replace("/", "_") / f"{what}-{seed}"
        )

    def _named(self, arm: str) -> str:
        """Name an arm together with its language model and weight, if it has them."""
        if arm == "none":
            return arm
        weight = "" if arm == "lm" else f"-{self.options['weight']:g}"
        if arm in NO_LM:
            return f"{arm}{weight}"
        model = self.given if isinstance(self.given, str) else f"{self.given.family}-{self.given.hash()[:8]}"
        return f"{arm}-{model}{weight}"

    def _inner(self) -> IntArray:
        """Return the fold of each training spot: its section, or its block if there is one section."""
        group = self.data.group.iloc[self.train]
        if len(self.train_names) > 1:
            return pd.factorize(group)[0]
        return spatial_blocks(self.data.xy[self.train], _INNER)

    def _term(self, arm: str, seed: int) -> nn.Module | None:
        if arm == "none":
            return None
        if arm == "gaussian":
            return GaussianPrior(self.expression(self.train))
        names = self.genes
        kind = arm if arm in ("feature", "match", "nll", "masked") else "feature"
        if arm == "permuted":
            names = list(np.random.default_rng(seed).permutation(names))
        lm = self._untrained(seed) if arm == "random" else self._trained
        return Plausibility(lm, kind=cast(Any, kind), genes=names, random_state=seed)

    @cached_property
    def _judge(self) -> LikelihoodScores:
        """What tells predicted from measured spots."""
        return LikelihoodScores(self._trained, pd.Index(self.genes))

    @cached_property
    def _trained(self) -> CellModel:
        """The language model, trained on the training sections of this fold unless one was given."""
        if isinstance(self.given, CellModel):
            return self.given
        spots = self.adata[self.train, self.genes].copy()
        options = {name: value for name, value in self.pretraining.items() if name != "size"}
        if self.given == "scgpt":
            # values of predictions are normalised over all genes, not over those of the language model
            spots.X = self.expression(self.train)
            options["layer"] = None
        return pretrain(
            spots,
            self._untrained(self.seed),
            lr=_LM_LR,
            batch_size=_LM_BATCH,
            config=TrainConfig(schedule="cosine", warmup=20),
            run_dir=self._run(self._named("lm"), self.seed),
            random_state=self.seed,
            **options,
        )

    def _untrained(self, seed: int) -> CellModel:
        """Return a language model with new weights, like the trained one."""
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            if isinstance(self.given, str):
                reads_values = self.given == "scgpt"
                encoder = ValueEncoder(max_len=len(self.genes) + 1, target_sum=None) if reads_values else None
                return models.build(
                    self.given, vocab=self.genes, encoder=encoder, size=self.pretraining["size"], dropout=0.0
                )
            return type(self.given)(self.given.config, self.given.vocab, self.given.encoder)


def _two_scores(truth: FloatArray, guess: FloatArray) -> tuple[float, float]:
    return float(np.nanmean(metrics.pearson(truth, guess))), metrics.correlation_error(truth, guess)


def _resampled(xy: FloatArray, rng: np.random.Generator) -> IntArray:
    """Draw contiguous blocks of spots with replacement, as many as there are."""
    block = spatial_blocks(xy, _BLOCKS)
    drawn = rng.integers(block.max() + 1, size=block.max() + 1)
    return np.concatenate([np.flatnonzero(block == one) for one in drawn])
