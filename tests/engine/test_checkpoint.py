"""Full disks, damaged files and files that disappear."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from engine.runs import assert_same_curve, curve, interrupted, pretrain, start, wait_for_step
from messages import naming

import scllm
from scllm.engine import checkpoint
from scllm.models.storage import read_torch

SETTINGS = {"epochs": 2, "config": {"save_every": 3}}
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"


@pytest.fixture(scope="module")
def finished(_toy, tmp_path_factory):
    """A finished run."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    pretrain(_toy.copy(), run_dir, **SETTINGS)
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    """A run that was killed after its last step, before it was marked as done."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "done").unlink()
    return tmp_path / "run"


class TouchWhenLoaded:
    """Code in a pickle: writes a file as soon as it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_restored_checkpoint_equals_the_saved_one(tmp_path):
    state = {"model": {"weight": torch.arange(3.0)}, "step": 7, "best": 0.5}
    checkpoint.save(tmp_path / "last.pt", state)
    found = checkpoint.restore(tmp_path / "last.pt")
    assert torch.equal(found["model"].pop("weight"), state["model"].pop("weight"))
    assert found == state
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_restoring_without_a_checkpoint_returns_none(tmp_path):
    assert checkpoint.restore(tmp_path / "last.pt") is None


@pytest.mark.parametrize("full", ["last.pt", "history.jsonl"])
def test_a_full_disk_is_an_error_that_keeps_the_last_good_checkpoint(finished, toy, tmp_path, full):
    run_dir = tmp_path / "run"
    interrupted(toy, run_dir, 5, **SETTINGS)
    step, size = read_torch(run_dir / "last.pt")["step"], (run_dir / full).stat().st_size
    # limits the size of files, so that the history cannot grow and the checkpoint is incomplete
    process = start(run_dir, before=LIMIT.format(size // 2 if full == "last.pt" else size + 10), **SETTINGS)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert re.search(naming("OSError", "step-" if full == "last.pt" else run_dir / full, "run_dir"), output)
    assert read_torch(run_dir / "last.pt")["step"] == step
    assert not list(run_dir.rglob(".*.new"))
    pretrain(toy, run_dir, **SETTINGS)
    assert_same_curve(curve(run_dir), curve(finished))


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "of other bytes": lambda content: bytes(range(256)) * 9,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_an_error_that_names_them(toy, run_dir, damage):
    content = (run_dir / "best_model.pt").read_bytes()
    (run_dir / "best_model.pt").write_bytes(DAMAGES[damage](content))
    with pytest.raises(ValueError, match=naming("best_model.pt", "truncated", "damaged", "code")):
        pretrain(toy, run_dir, **SETTINGS)
    (run_dir / "best_model.pt").write_bytes(content)
    pretrain(toy, run_dir, **SETTINGS)
    assert (run_dir / "done").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(toy, run_dir, damage):
    whole, newest = curve(run_dir), run_dir / "checkpoints" / "step-14.pt"
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    with pytest.warns(UserWarning, match=naming(newest, "damaged", "step 12")):
        pretrain(toy, run_dir, **SETTINGS)
    assert_same_curve(curve(run_dir), whole)
    assert (run_dir / "done").exists()


def test_damaged_checkpoints_without_another_one_are_an_error(toy, run_dir):
    for path in (run_dir / "checkpoints").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=naming("step-14.pt", "truncated", "damaged", "code")):
        pretrain(toy, run_dir, **SETTINGS)


def test_the_newest_checkpoints_are_kept(toy, tmp_path):
    pretrain(toy, tmp_path / "two", epochs=1, config={"save_every": 1})
    pretrain(toy, tmp_path / "three", epochs=1, config={"save_every": 1, "keep_last": 3})
    for name, steps in (("two", (6, 7)), ("three", (5, 6, 7))):
        assert {path.name for path in (tmp_path / name / "checkpoints").iterdir()} == {f"step-{i}.pt" for i in steps}
        assert (tmp_path / name / "last.pt").resolve().name == "step-7.pt"


def test_only_errors_of_the_disk_are_called_so(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), checkpoint.writing(tmp_path / "file"):
        raise RuntimeError("something else")


@pytest.mark.parametrize("name", ["last.pt", "best_model.pt"])
@pytest.mark.parametrize(
    "write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_place_of_a_checkpoint_is_not_executed(toy, run_dir, tmp_path, name, write):
    trace = tmp_path / "trace"
    files = [run_dir / name] if name == "best_model.pt" else (run_dir / "checkpoints").iterdir()
    for file in files:
        write({"model": TouchWhenLoaded(trace)}, file)
    with pytest.raises(ValueError, match=naming(name if name == "best_model.pt" else "step-14.pt", "damaged", "code")):
        pretrain(toy, run_dir, **SETTINGS)
    assert not trace.exists()


def test_truncated_weights_are_an_error_that_names_them(finished, tmp_path):
    weights = tmp_path / "model" / "weights.safetensors"
    shutil.copytree(finished / "model", weights.parent)
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match=naming(weights)):
        scllm.models.load(weights.parent)


def test_a_file_that_is_deleted_during_training_is_read_to_the_end(toy, tmp_path):
    path, run_dir = tmp_path / "toy.h5ad", tmp_path / "run"
    toy.write_h5ad(path)
    thread = threading.Thread(target=lambda: (wait_for_step(run_dir, 4), path.unlink()))
    thread.start()
    model = pretrain(path, run_dir, **SETTINGS)
    thread.join()
    assert len(model.history) == 16


def test_a_missing_store_is_an_error_that_names_it_and_the_run_resumes_when_it_is_restored(toy, tmp_path):
    path, run_dir = tmp_path / "toy.zarr", tmp_path / "run"
    toy.write_zarr(path)
    pretrain(path, tmp_path / "whole", **SETTINGS)
    # zarr reads its files again in each epoch
    thread = threading.Thread(target=lambda: (wait_for_step(run_dir, 4), path.rename(tmp_path / "away")))
    thread.start()
    with pytest.raises(OSError, match=str(path)):
        pretrain(path, run_dir, **SETTINGS)
    thread.join()
    (tmp_path / "away").rename(path)
    pretrain(path, run_dir, **SETTINGS)
    assert_same_curve(curve(run_dir), curve(tmp_path / "whole"))


def test_a_run_whose_file_was_truncated_between_two_calls_resumes_when_it_is_restored(toy, tmp_path):
    path, run_dir = tmp_path / "toy.h5ad", tmp_path / "run"
    toy.write_h5ad(path)
    interrupted(path, run_dir, 5, **SETTINGS)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="truncated"):
        pretrain(path, run_dir, **SETTINGS)
    path.write_bytes(content)
    assert len(pretrain(path, run_dir, **SETTINGS).history) == 16


def test_weights_of_a_run_that_has_not_finished_can_be_loaded(run_dir):
    with pytest.raises(ValueError, match=naming(run_dir, "checkpoint='best'")):
        scllm.models.load(run_dir)
    states = {"best": read_torch(run_dir / "best_model.pt"), "last": read_torch(run_dir / "last.pt")["model"]}
    for name, saved in states.items():
        model = scllm.models.load(run_dir, checkpoint=name)
        torch.testing.assert_close(dict(model.state_dict()), dict(saved), rtol=0, atol=0)
        assert len(model.history) == len(curve(run_dir))


def test_a_checkpoint_that_is_not_there_or_has_another_name_is_an_error(run_dir):
    with pytest.raises(ValueError, match=naming("'newest'", "best", "last")):
        scllm.models.load(run_dir, checkpoint="newest")
    with pytest.raises(ValueError, match=naming("vocab=", "checkpoint=")):
        scllm.models.load(run_dir, checkpoint="last", vocab=["gene_1"])
    with pytest.raises(ValueError, match=naming(run_dir / "model", "spec.json")):
        scllm.models.load(run_dir / "model", checkpoint="last")
    (run_dir / "last.pt").unlink()
    with pytest.raises(FileNotFoundError, match=naming(run_dir, "last.pt")):
        scllm.models.load(run_dir, checkpoint="last")
