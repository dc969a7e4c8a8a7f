"""Train a predictor of expression from histology."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.metadata import version
from os import PathLike
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from anndata import AnnData
from torch import nn

from scllm import _keys, models
from scllm._checks import check_adata
from scllm._log import log
from scllm._results import record, thinned_history
from scllm._typing import IntArray
from scllm.data.cells import CellSource
from scllm.data.encode import encoder_to_dict
from scllm.data.fingerprint import fingerprint, hash_arrays
from scllm.data.opened import closes_files
from scllm.data.targets import dense, normalised
from scllm.data.value_kind import value_kind
from scllm.engine.config import Precision, Settings, TrainConfig
from scllm.engine.device import resolve_device
from scllm.engine.run import Run
from scllm.engine.spec import Cells, DataSpec, RunSpec
from scllm.engine.spots import Spots, Term, fit_spots
from scllm.models.base import CellModel
from scllm.models.plausibility import Plausibility, PlausibilityKind
from scllm.models.spatial import FINETUNE, Likelihood, Model
from scllm.tl._ledger import record_training
from scllm.tl._model import ModelLike, remember
from scllm.tl._parts import divide
from scllm.tl._spatial_inputs import expression_source, genes_to_predict, image_inputs, neighbours
from scllm.tl._train import check_config, check_resume, merged_config, open_run

__all__ = ["fit_spatial"]

_DEFAULTS = {
    **FINETUNE,
    "gene_init": "random",
    "use_dropout": True,
    "head_reads": "last",
    "schedule": "cosine",
    "warmup": 10,
}
_WEIGHT_DECAY = 0.01
_ROWS = 1024  # spots whose expression is dense at a time


@closes_files
def fit_spatial(
    adata: AnnData,
    *,
    use_rep: str | None = _keys.PATCH_FEATURES,
    layer: str | None = None,
    genes: Iterable[str] | None = None,
    lm: ModelLike | nn.Module | None = None,
    plausibility: PlausibilityKind = "feature",
    weight: float = 0.1,
    likelihood: Likelihood = "mse",
    n_neighbors: int = 6,
    size: str = "base",
    library_key: str | None = None,
    validation: float | str = 0.1,
    group_key: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    device: str = "auto",
    run_dir: str | PathLike[str] | None = None,
    precision: Precision = "auto",
    resume: Literal["auto"] | bool = "auto",
    config: TrainConfig | None = None,
    random_state: int = 0,
) -> CellModel:
    """Train a predictor of expression from the histology image around each spot.

    A multilayer perceptron reads the image features of a spot and the mean features of its nearest spots. It is trained
    to predict log-normalised expression, optionally together with the plausibility of the prediction under a frozen
    gene language model (:class:`scllm.models.Plausibility`). The weights with the best prediction loss on the
    validation spots are kept.

    Parameters
    ----------
    adata
        Spots by genes, with ``obsm["spatial"]``.
    use_rep
        Image features in ``obsm``. ``None``: train a small convolutional network on the patches of
        :func:`scllm.pp.image_patches` together with the predictor, with random stains and orientations.
    layer
        Layer to predict. ``None``: ``X``. Counts are normalised to 10,000 per spot over all genes of ``adata`` and
        log-transformed; other values are predicted as they are.
    genes
        Genes to predict. ``None``: those that :func:`scllm.pp.spatially_variable` marked, or else all.
    lm
        A gene language model (gpt2, albert, xlnet, or scgpt with a ``ValueEncoder``) or its path. It should not have
        been trained on spots that are used to evaluate. Also a ready :class:`scllm.models.Plausibility`, or any module
        that maps predicted and true expression, ``(b, g)`` each, to a loss per spot. ``None``: no such term.
    plausibility
        ``"feature"``, ``"match"``, ``"nll"`` or ``"masked"``, see :class:`scllm.models.Plausibility`. Not used if
        ``lm`` is a module.
    weight
        Ratio of the gradient norms of the plausibility and of the prediction loss, both at the prediction. It is set
        anew every 50 steps. 0: no plausibility term.
    likelihood
        ``"mse"``: squared error of log-normalised values. ``"nb"``: negative binomial likelihood of counts.
    n_neighbors
        Number of nearest spots of the same section whose mean features are read too; 0 for none.
    size
        Size of the predictor: ``"tiny"``, ``"small"`` or ``"base"`` (64, 128 or 256 hidden units).
    library_key
        Column of ``obs`` that names the section of each spot. ``None``: the column whose values are the keys of
        ``uns["spatial"]``, or one section if it has at most one key.
    validation
        Fraction of spots held out, or a column of ``obs`` written by :func:`scllm.pp.split`. Neighbouring spots are
        alike, so pass ``group_key`` to hold out whole sections if there are enough.
    group_key
        Column of groups (sections, patients) that are held out whole for validation.
    epochs
        Passes over the training spots (60).
    batch_size
        Spots per optimiser step (32).
    lr
        Peak learning rate (1e-3). It falls to zero as a cosine.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    run_dir
        Directory in which the run is written and resumed. ``None``: a new one under ``scllm.settings.run_dir``.
    precision
        Only ``"auto"`` and ``"fp32"``: the predictor is too small to gain from others.
    resume
        ``"auto"`` resumes a run with the same settings in ``run_dir``, if there is one. ``True`` requires such a run,
        ``False`` requires an empty directory.
    config
        Further settings (``weight_decay``, ``clip``, ``warmup``, ``patience``, ``schedule`` and ``steps`` are used),
        see :class:`scllm.tl.TrainConfig`.
    random_state
        Seed for initial weights, validation spots, data order and dropout.

    Returns
    -------
    The trained predictor, with its ``history``.

    Writes
    ------
    ``adata.uns["scllm"]["fit_spatial"]``
        Settings, and the history as ``table``.
    ``adata.uns["scllm"]["model"]``
        Path, family and hash of the predictor.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=2, side=8)
    >>> scllm.pp.image_patches(adata, pixels=16)
    >>> scllm.tl.embed_patches(adata, encoder=lambda patches: patches.float().mean((1, 2)))
    >>> model = scllm.tl.fit_spatial(adata, epochs=2)
    >>> scllm.tl.predict_spatial(adata, model)
    >>> adata.layers["predicted"].shape
    (128, 80)
    """
    check_adata(adata)
    check_config(config)
    check_resume(resume, run_dir)
    _check_options(weight, n_neighbors, precision, plausibility)
    source = expression_source(adata, layer)
    names = genes_to_predict(adata, genes)
    where = resolve_device(device)
    config = replace(config, weight_decay=_WEIGHT_DECAY) if config and not config.weight_decay else config
    config = config or TrainConfig(weight_decay=_WEIGHT_DECAY)
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    settings = merged_config(config, given, _DEFAULTS, precision="fp32", random_state=random_state)
    spots = _spots(adata, source, use_rep, names, n_neighbors, library_key, likelihood)
    training, held_out = divide(source, validation, group_key=group_key, random_state=settings.random_state)
    model = _new_model(spots, names, use_rep, n_neighbors, likelihood, size, settings.random_state)
    module = _plausibility(lm, plausibility, names, weight, settings.random_state)
    _begin(model, spots, training)
    model.trained_on = record_training(None, "fit_spatial", adata, source, training)
    params = {
        "use_rep": use_rep,
        "layer": layer,
        "plausibility": _kind(module),
        "weight": weight if module is not None else 0.0,
        "likelihood": likelihood,
        "n_neighbors": n_neighbors,
        "validation": validation,
        "group_key": group_key,
        "library_key": library_key,
        "lm": _digest(module),
    }
    cells = Cells(training, held_out)
    spec = _spec(model, source, spots, cells, settings, params, where)
    run = open_run(spec, run_dir=run_dir, resume=resume)
    log.info("training on %d spots to predict %d genes on %s", len(training), len(names), where)
    trained = _trained(run, spec, model, cells, spots, None if module is None else Term(module, weight), where)
    used = {name: value for name, value in settings.to_dict().items() if name in _USED}
    record(adata, "fit_spatial", {**params, **used, "run_dir": run.path}, thinned_history(trained.history))
    remember(adata, trained)
    return trained


_USED = (
    "epochs",
    "steps",
    "batch_size",
    "lr",
    "schedule",
    "warmup",
    "weight_decay",
    "clip",
    "patience",
    "random_state",
)


def _check_options(weight: float, n_neighbors: int, precision: str, plausibility: str) -> None:
    if not weight >= 0 or n_neighbors < 0:
        raise ValueError(
            f"Expected weight and n_neighbors of at least 0, got weight={weight} and n_neighbors={n_neighbors}. Pass 0 "
            "for none."
        )
    if precision not in ("auto", "fp32"):
        raise ValueError(f"Expected precision to be 'auto' or 'fp32', got {precision!r}. Leave it out.")
    kinds = get_args(PlausibilityKind)
    if plausibility not in kinds:
        raise ValueError(f"Expected plausibility to be one of {kinds}, got {plausibility!r}. Pass one of them.")


def _spots(
    adata: AnnData,
    source: CellSource,
    use_rep: str | None,
    names: list[str],
    n_neighbors: int,
    library_key: str | None,
    likelihood: str,
) -> Spots:
    features, reader = image_inputs(adata, use_rep)
    rows = np.arange(source.n_obs)
    counts = source.read(rows)
    is_counts = value_kind(counts) == "counts"
    if likelihood == "nb" and not is_counts:
        raise ValueError(
            "Expected counts for likelihood='nb', got other values. Pass the layer that holds counts as layer=, or use "
            "likelihood='mse'."
        )
    target = normalised(source, rows, is_counts=is_counts)
    near = neighbours(adata, n_neighbors, library_key)
    columns = adata.var_names.get_indexer(names)
    return Spots(features, reader, near, target, counts if likelihood == "nb" else None, columns)


def _new_model(
    spots: Spots, names: list[str], use_rep: str | None, n_neighbors: int, likelihood: str, size: str, seed: int
) -> Model:
    settings: dict[str, Any] = {"n_neighbors": n_neighbors, "likelihood": likelihood, "use_rep": use_rep}
    if spots.features is None:
        settings |= {"d_features": 256, "pixels": spots.reader.pixels if spots.reader else 0}
    else:
        settings["d_features"] = spots.features.shape[1]
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        return cast(Model, models.build("spatial", vocab=names, size=size, **settings))


def _begin(model: Model, spots: Spots, training: IntArray) -> None:
    """Standardise features and begin at the mean expression, both of the training spots."""
    if spots.features is not None:
        model.standardise_as(torch.from_numpy(spots.features[training]))
    total = np.zeros(len(spots.columns))
    for start in range(0, len(training), _ROWS):
        total += dense(spots.target[training[start : start + _ROWS]], spots.columns).sum(axis=0, dtype=np.float64)
    model.begin_at(torch.from_numpy((total / len(training)).astype(np.float32)))


def _plausibility(
    lm: ModelLike | nn.Module | None, kind: PlausibilityKind, names: list[str], weight: float, seed: int
) -> nn.Module | None:
    if lm is None or weight == 0:
        return None
    if isinstance(lm, nn.Module) and not isinstance(lm, CellModel):
        return deepcopy(lm)
    return Plausibility(cast(Any, lm), kind=kind, genes=names, random_state=seed)


def _digest(module: nn.Module | None) -> str | None:
    """Hash the module of the plausibility term, because a run with another one is another run."""
    if module is None:
        return None
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    said = json.dumps([type(module).__name__, _settings(module)], sort_keys=True)
    return hash_arrays({**arrays, "": np.frombuffer(said.encode(), np.uint8)})


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module and its parts, without those that training sets itself."""
    if isinstance(module, CellModel):
        return {"hash": module.hash()}
    set_in_training = ("tau", "n_calls", "training") if hasattr(module, "tau") else ()
    own = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    parts = {name: _settings(part) for name, part in module.named_children()}
    return {**{name: value for name, value in own.items() if name not in set_in_training}, **parts}


def _kind(module: nn.Module | None) -> str | None:
    """Name the plausibility term."""
    if module is None:
        return None
    return module.kind if isinstance(module, Plausibility) else type(module).__name__


def _spec(
    model: Model,
    source: CellSource,
    spots: Spots,
    cells: Cells,
    settings: Settings,
    params: Mapping[str, Any],
    device: torch.device,
) -> RunSpec:
    """Return the specification of the run; features and neighbours count as the tokens of spots."""
    inputs = {"neighbours": spots.neighbours, "columns": spots.columns}
    if spots.features is not None:
        inputs["features"] = spots.features
    elif spots.reader is not None:
        inputs["boxes"] = spots.reader.boxes
    data = DataSpec(fingerprint(source), source.layer, cells.hash(), hash_arrays(inputs), None, 0.0)
    objective = {name: params[name] for name in ("likelihood", "plausibility", "weight")}
    return RunSpec(
        verb="fit_spatial",
        family=model.family,
        model=asdict(model.config),
        weights=model.hash(),
        encoder=encoder_to_dict(model.encoder),
        heads=(),
        objective=objective,
        train=settings,
        freeze=0,
        lora=None,
        params={name: str(value) for name, value in params.items()},
        data=data,
        data_reference=None,
        data_stamp=None,
        processes={"n": 1, "device": device.type},
        versions={"scllm": version("scllm-tools"), "torch": torch.__version__},
    )


def _trained(
    run: Run, spec: RunSpec, model: Model, cells: Cells, spots: Spots, term: Term | None, device: torch.device
) -> Model:
    """Train the model of a run directory to the end, unless that is done, and return it."""
    if not run.is_done:
        with run.locked():
            if run.is_new():
                model.save(run.model)
                run.create(spec, cells)
            model.path = None
            fit_spots(run, model, spots, spec.train, term, device)
            model.history = run.table()
            run.replace_model(model)
            run.finish()
    return cast(Model, models.load(run.path))
