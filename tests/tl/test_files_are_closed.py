"""Files that a call opens are closed when it ends, whatever still holds its variables."""

from __future__ import annotations

import gc
import importlib
import inspect
import pkgutil

import anndata
import h5py
import pytest

from scllm import datasets, models, pp, tl
from scllm.data.source import open_source
from scllm.tl import TrainConfig

SHORT = {"epochs": 1, "batch_size": 100, "device": "cpu", "config": TrainConfig(max_len=8)}
CALLS = {
    "pretrain": lambda data, model, folder: tl.pretrain(data, model, run_dir=folder / "run", **SHORT),
    "finetune": lambda data, model, folder: tl.finetune(data, model, key="cell_type", run_dir=folder / "run", **SHORT),
    "embed": lambda data, model, folder: tl.embed(data, model, device="cpu"),
    "gene_medians": lambda data, model, folder: pp.gene_medians(data),
}


@pytest.fixture
def cells():
    return datasets.toy(n_cells=60)


@pytest.fixture
def model(cells):
    return models.build("scgpt", vocab=cells.var_names, size="tiny")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cells.h5ad"


@pytest.fixture(params=["file", "list", "backed"])
def on_disk(request, path):
    """Write cells, and return what a verb takes."""

    def write(cells):
        cells.write_h5ad(path)
        return {"file": path, "list": [path]}.get(request.param) or anndata.read_h5ad(path, backed="r")

    return write


@pytest.fixture
def no_collector():
    """Reference cycles are kept, as they are until Python happens to collect them."""
    gc.disable()
    yield
    gc.enable()


def assert_can_be_written(path, data):
    if isinstance(data, anndata.AnnData):
        data.file.close()
    with h5py.File(path, "w"):
        pass


@pytest.mark.parametrize("verb", CALLS)
def test_a_file_can_be_written_after_a_call(verb, on_disk, cells, path, model, tmp_path, no_collector):
    data = on_disk(cells)
    CALLS[verb](data, model, tmp_path)
    assert_can_be_written(path, data)


@pytest.mark.parametrize("verb", CALLS)
def test_a_file_can_be_written_after_an_error(verb, on_disk, cells, path, model, tmp_path, no_collector):
    cells.X = -cells.X
    data = on_disk(cells)
    with pytest.raises(ValueError, match="negative") as kept:
        CALLS[verb](data, model, tmp_path)
    assert_can_be_written(path, data)
    del kept


def test_a_source_of_the_caller_stays_open(cells, model, path):
    cells.write_h5ad(path)
    source = open_source(path)
    path.unlink()  # it could not be opened again
    tl.embed(source, model, device="cpu")
    assert source.read(slice(0, 3)).nnz == cells.X[:3].nnz


def test_every_verb_that_opens_files_closes_them():
    verbs = [
        verb
        for package in (pp, tl)
        for info in pkgutil.iter_modules(package.__path__)
        if "open_source(" in inspect.getsource(importlib.import_module(f"{package.__name__}.{info.name}"))
        for name, verb in vars(package).items()
        if inspect.isfunction(verb) and inspect.unwrap(verb).__module__ == f"{package.__name__}.{info.name}"
    ]
    assert len(verbs) > 10
    assert [verb.__name__ for verb in verbs if not hasattr(verb, "__wrapped__")] == []
    assert tl.embed in verbs
