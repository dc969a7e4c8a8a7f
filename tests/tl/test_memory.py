"""No model outlives its last owner: on a GPU, every one that did would keep its weights there."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from contextlib import contextmanager

import pytest
import torch

from scllm import datasets, models, tl
from scllm.models.base import CellModel

FAMILIES = ("scgpt", "geneformer", "scbert", "scfoundation", "gpt2", "albert", "xlnet")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def cells():
    """60 cells by 40 genes, four types."""
    return datasets.toy(n_cells=60, n_genes=40)


@pytest.fixture(autouse=True)
def _older_objects_are_not_searched():
    """A collection takes seconds if it searches everything that earlier tests and imports have left."""
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def no_collection():
    """Without the garbage collector, which would also free what only cycles keep alive."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def built(family, cells, **config) -> CellModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return models.build(family, vocab=cells.var_names, size="tiny", **config).eval()


def modules(model) -> list[weakref.ref]:
    return [weakref.ref(module) for module in model.modules()]


def alive(refs) -> list[str]:
    return [type(ref()).__name__ for ref in refs if ref() is not None]


def living_models() -> set[int]:
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), CellModel)}


MADE_BY = {
    "build": lambda model: model,
    "copy": copy.deepcopy,
    "quantize": tl.quantize,
    "quantize twice": lambda model: copy.deepcopy(tl.quantize(model)),
    "prune": tl.prune,
    "structured": lambda model: tl.prune(model, amount=0.5, structured=True),
}


@every_family
@pytest.mark.parametrize("way", MADE_BY)
def test_a_model_is_freed_with_its_last_name(family, way, cells):
    made = MADE_BY[way]
    made(built(family, cells))  # imports, and classes that are made once
    with no_collection():
        made_now = made(built(family, cells))
        refs = modules(made_now)
        del made_now
        assert alive(refs) == []


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where it compiles
@every_family
@pytest.mark.parametrize("how", ["compile", "checkpointing"])
def test_a_model_that_was_sped_up_for_training_is_freed_with_its_last_name(family, how, cells):
    importlib.import_module("torch._dynamo")  # keeps the frames, and with them the variables, of its first import
    with no_collection():
        model = built(family, cells)
        model.speed_up(**{how: True})
        refs = modules(model)
        del model
        assert alive(refs) == []


@pytest.mark.filterwarnings("ignore:after the first epoch")
@pytest.mark.parametrize("family", ["scgpt", "scbert", "xlnet"])
def test_no_model_survives_the_verbs(family, cells):
    adata = cells.copy()
    tuned = tl.finetune(adata, built(family, cells), key="cell_type", epochs=1, device="cpu")
    before = living_models()
    tl.embed(adata, tuned, device="cpu")
    tl.embed(adata, tuned, device="cpu", precision="bf16")  # works on a copy
    tl.classify(adata, tuned, device="cpu")
    assert living_models() == before
    again = tl.finetune(adata, tuned, key="cell_type", epochs=1, device="cpu")
    assert living_models() == before | {id(again)}


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_no_model_survives_pretraining_and_cross_validation(cells):
    before = living_models()
    adata = cells.copy()
    model = tl.pretrain(adata, size="tiny", epochs=1, device="cpu")
    tl.cross_validate(adata, model, key="cell_type", n_folds=2, epochs=1, baseline=False, device="cpu")
    tl.embed_genes(adata, model, contextual=True)
    assert living_models() == before | {id(model)}


def test_a_model_that_was_never_saved_lives_as_long_as_the_data_it_is_recorded_on(cells):
    first, second, adata = built("scgpt", cells), built("gpt2", cells), cells.copy()
    refs = [weakref.ref(first), weakref.ref(second)]
    tl.embed(adata, first, device="cpu")
    del first
    tl.embed(adata, device="cpu", key_added="again")
    tl.embed(adata, second, device="cpu")
    del second
    gc.collect()
    assert refs[0]() is None  # another was recorded
    copied = adata.copy()
    tl.embed(copied, device="cpu", key_added="again")
    del adata
    gc.collect()
    tl.embed(copied, device="cpu", key_added="once more")
    del copied
    gc.collect()
    assert refs[1]() is None


def test_a_model_that_is_saved_and_recorded_again_is_freed(cells, tmp_path):
    model, adata = built("scgpt", cells), cells.copy()
    ref = weakref.ref(model)
    tl.embed(adata, model, device="cpu")
    model.save(tmp_path / "model")
    tl.embed(adata, model, device="cpu")
    del model
    gc.collect()
    assert ref() is None
    tl.embed(adata, device="cpu", key_added="again")
