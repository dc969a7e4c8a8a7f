"""The command line: what is printed, what is written, and how errors leave."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from messages import naming
from typer.testing import CliRunner

from scllm import models, tl
from scllm.cli import _train, _use, app
from scllm.cli._app import Debug, Verbose, _exit_code, _one_line

# what the command line has beside the verb, and what only an AnnData in memory has
ONLY_COMMAND = {"family", "out", "dry_run", "write_only", "verbose", "debug"}
ONLY_VERB = {"copy"}


def call(*arguments: object):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def shell(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does."""
    return subprocess.run(
        [sys.executable, "-m", "scllm", *map(str, arguments)], capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(_planted: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    _planted.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    done = call("pretrain", data, "--size", "tiny", "--epochs", 1, "--run-dir", run)
    assert done.exit_code == 0, done.output
    return run


@pytest.fixture(scope="module")
def tuned(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tuned"
    done = call("finetune", data, pretrained, "--key", "cell_type", "--epochs", 1, "--run-dir", run)
    assert done.exit_code == 0, done.output
    return run


def test_help_names_each_command_and_loads_nothing_heavy() -> None:
    code = "import sys\nfrom scllm.cli import main\nsys.argv = ['scllm', '--help']\ntry:\n    main()\nfinally:\n"
    run = subprocess.run(
        [sys.executable, "-c", code + "    print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    for name in ("demo", "pretrain", "run", "info", "embed", "finetune", "classify", "genecorpus"):
        assert f"\n  {name} " in run.stdout
    assert not set(run.stdout.split()) & {"torch", "scanpy", "numba", "anndata", "matplotlib"}


@pytest.mark.parametrize(
    ("command", "verb"),
    [
        (_train.pretrain, tl.pretrain),
        (_train.finetune, tl.finetune),
        (_use.embed, tl.embed),
        (_use.classify, tl.classify),
    ],
)
def test_commands_have_the_options_of_their_verbs(command, verb) -> None:
    ours, theirs = inspect.signature(command).parameters, inspect.signature(verb).parameters
    names = {"adata": "data"}
    assert [name for name in ours if name not in ONLY_COMMAND] == [
        names.get(name, name) for name in theirs if name not in {*ONLY_VERB, *(ONLY_COMMAND & set(theirs))}
    ]
    same = {
        "size",
        "device",
        "precision",
        "random_state",
        "upsample",
        "hidden_layer",
        "key_added",
        "n_gpus",
        "threshold",
    }
    assert all(ours[name].default == theirs[name].default for name in same & set(ours))


def test_every_command_can_be_verbose_and_debugged() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        hints = inspect.get_annotations(command.callback, eval_str=True)
        assert hints["verbose"] == Verbose
        assert hints["debug"] == Debug


def test_model_goes_from_pretraining_to_labels(data: Path, tuned: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    assert call("classify", data, tuned, "--out", labels).exit_code == 0
    table = pd.read_csv(labels, index_col="cell")
    assert list(table) == ["scllm_label", "scllm_label_prob"]
    assert set(table["scllm_label"]) <= {"A", "B"}
    assert list(table.index) == list(ad.read_h5ad(data).obs_names)


def test_classify_writes_the_data_with_labels(data: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "labelled.h5ad"
    assert call("classify", data, tuned, "--out", out, "--threshold", 1, "--key-added", "label").exit_code == 0
    assert set(ad.read_h5ad(out).obs["label"]) == {"unknown"}


def test_classify_finds_cells_of_unseen_types(data: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.csv"
    done = call("classify", data, tuned, "--out", out, "--unknown", "distance", "--threshold", 0)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out, index_col="cell")
    assert list(table) == ["scllm_label", "scllm_label_prob", "scllm_label_distance"]
    assert set(table["scllm_label"]) == {"unknown"}
    assert call("classify", data, tuned, "--out", out, "--fpr", 0.1).exit_code == 2


def test_labels_are_those_of_this_call_alone(data: Path, tuned: Path, tmp_path: Path) -> None:
    cells, labels = ad.read_h5ad(data), tmp_path / "labels.csv"
    for name in ("scllm_label", "scllm_label_old", "scllm_label_prob_old"):
        cells.obs[name] = "A"
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert call("classify", tmp_path / "cells.h5ad", tuned, "--out", labels).exit_code == 0
    assert list(pd.read_csv(labels, index_col="cell")) == ["scllm_label", "scllm_label_prob"]
    assert call("classify", tmp_path / "cells.h5ad", tuned, "--out", labels, "--key-added", "batch").exit_code == 0
    assert list(pd.read_csv(labels, index_col="cell")) == ["batch", "batch_prob"]


def test_labels_of_several_heads_are_all_written(data: Path, pretrained: Path, tmp_path: Path) -> None:
    cells, labels = ad.read_h5ad(data), tmp_path / "labels.csv"
    cells.obs["depth"] = np.asarray(cells.X.sum(1)).ravel()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    keys = ("--key", "cell_type", "--key", "depth", "--epochs", 1, "--run-dir", tmp_path / "run")
    done = call("finetune", tmp_path / "cells.h5ad", pretrained, *keys, "--freeze", "encoder")
    assert done.exit_code == 0, done.output
    assert call("classify", data, tmp_path / "run", "--out", labels).exit_code == 0
    expected = ["scllm_label_cell_type", "scllm_label_cell_type_prob", "scllm_label_depth"]
    assert list(pd.read_csv(labels, index_col="cell")) == expected


def test_a_published_checkpoint_is_named_by_its_family(data: Path, shared: Path, tmp_path: Path) -> None:
    checkpoint = shared / "parity" / "scgpt" / "checkpoint"
    cells = ad.read_h5ad(data)
    model = models.load(checkpoint, family="scgpt")
    cells.var_names = model.vocab.genes[:40]
    path, family = tmp_path / "cells.h5ad", ("--family", "scgpt")
    cells.write_h5ad(path)
    without = call("embed", path, checkpoint, "--out", tmp_path / "e.npy")
    assert (without.exit_code, "family=" in without.stderr) == (2, True)
    for name in ("e.npy", "e.h5ad"):
        done = call("embed", path, checkpoint, *family, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
    tl.embed(cells, model)
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), cells.obsm["X_scllm"], atol=1e-6)
    done = call("classify", path, checkpoint, *family, "--out", tmp_path / "labels.csv")
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "labels.csv")) == 60
    once = ("--epochs", 1, "--batch-size", 32)
    done = call(
        "finetune", path, checkpoint, *family, "--key", "cell_type", "--freeze", "encoder", *once,
        "--run-dir", tmp_path / "tuned",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    done = call("pretrain", path, "--model", checkpoint, *family, "--dry-run", *once)
    assert done.exit_code == 0, done.output
    assert "2 layers x 4 heads x 48" in done.stdout


def test_rank_sentences_cannot_hold_labels(data: Path, tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sentences"
    assert call("genecorpus", data, "--out", folder).exit_code == 0
    for command, out in (("embed", "e.h5ad"), ("classify", "labels.csv")):
        done = call(command, folder, tuned, "--out", tmp_path / out)
        assert done.exit_code == 2
        assert re.search(naming(folder, ".h5ad", ".zarr", "--out .npy"), done.stderr)


def test_embed_writes_each_format_alike(data: Path, pretrained: Path, tmp_path: Path) -> None:
    for name in ("e.npy", "e.zarr", "e.h5ad"):
        done = call("embed", data, pretrained, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
    array = np.load(tmp_path / "e.npy")
    assert array.shape == (60, 64)
    assert np.array_equal(array, zarr.open_array(tmp_path / "e.zarr", mode="r")[:])
    assert np.array_equal(array, ad.read_h5ad(tmp_path / "e.h5ad").obsm["X_scllm"])


def test_several_paths_are_one_data_set(data: Path, pretrained: Path, tmp_path: Path) -> None:
    assert call("embed", data, data, pretrained, "--out", tmp_path / "two.npy").exit_code == 0
    two = np.load(tmp_path / "two.npy")
    assert np.array_equal(two[:60], two[60:])


def parts_of(data: Path, folder: Path) -> list[Path]:
    """Two files of dense counts that share 10 names of cells and 30 genes; the first has what the second lacks."""
    whole = ad.read_h5ad(data)
    whole.X = whole.X.toarray()
    first, second = whole[:40, :35].copy(), whole[30:, 5:].copy()
    first.layers["odd"] = first.X
    first.obsm["seen"] = np.ones((40, 2), np.float32)
    for name, part in (("first.h5ad", first), ("second.h5ad", second)):
        part.write_h5ad(folder / name)
    return [folder / "first.h5ad", folder / "second.h5ad"]


def test_files_of_dense_counts_and_other_genes_are_united(data: Path, pretrained: Path, tmp_path: Path) -> None:
    paths = parts_of(data, tmp_path)
    with pytest.warns(UserWarning, match=naming("'odd'", 2)):
        done = call("embed", *paths, pretrained, "--out", tmp_path / "e.h5ad")
    assert done.exit_code == 0, done.output
    assert call("embed", *paths, pretrained, "--out", tmp_path / "e.npy").exit_code == 0
    united = ad.read_h5ad(tmp_path / "e.h5ad")
    np.testing.assert_allclose(united.obsm["X_scllm"], np.load(tmp_path / "e.npy"), atol=1e-6)
    assert united.shape == (70, 40)
    assert not united[:40, [f"gene_{i}" for i in range(35, 40)]].X.any()
    # what a file does not say of its cells is missing
    np.testing.assert_array_equal(np.isnan(united.obsm["seen"]).all(axis=1), np.arange(70) >= 40)


@pytest.mark.filterwarnings("ignore:layer 'odd'")
def test_names_of_cells_that_files_share_get_the_number_of_their_file(data, tuned, tmp_path: Path) -> None:
    paths = parts_of(data, tmp_path)
    assert call("classify", *paths, tuned, "--out", tmp_path / "labels.csv").exit_code == 0
    names = pd.read_csv(tmp_path / "labels.csv")["cell"]
    assert names.is_unique
    assert list(names[[0, 29, 30, 39, 40, 50]]) == [
        "cell_0",
        "cell_29",
        "cell_30-0",
        "cell_39-0",
        "cell_30-1",
        "cell_40",
    ]


@pytest.mark.parametrize("command", ["embed", "classify"])
def test_data_written_over_are_replaced_and_not_written_into(command, data: Path, tuned: Path, tmp_path: Path) -> None:
    copy, kept = Path(shutil.copy(data, tmp_path)), tmp_path / "kept"
    os.link(copy, kept)
    done = call(command, copy, tuned, "--out", copy)
    assert done.exit_code == 0, done.output
    assert kept.read_bytes() == data.read_bytes()
    assert copy.read_bytes() != data.read_bytes()
    assert ad.read_h5ad(copy).shape == (60, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "kept"]


def test_one_of_several_files_is_not_written_over(data: Path, tuned: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copy(data, tmp_path / name)) for name in ("a.h5ad", "b.h5ad")]
    for given in (paths, [tmp_path]):
        done = call("embed", *given, tuned, "--out", tmp_path / "b.h5ad")
        assert done.exit_code == 2
        assert re.search(naming("--out", 2, "input files"), done.stderr)
    assert all(path.read_bytes() == data.read_bytes() for path in paths)


def test_info_tells_model_and_progress(tuned: Path) -> None:
    text = call("info", tuned).stdout
    for part in ("scgpt", "n_layers=2", "40 genes", "BinEncoder", "A, B", "finetune, finished", "best validation"):
        assert part in text
    assert "steps" not in call("info", tuned / "model").stdout


def test_run_continues_what_was_interrupted(pretrained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pretrained, tmp_path / "run")
    for name in ("done", "last.pt", "best_model.pt"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    assert "not finished" in call("info", run).stdout
    done = shell("run", run)
    assert done.returncode == 0, done.stderr
    assert (run / "done").exists()
    n_lines = [len((path / "history.jsonl").read_text().splitlines()) for path in (pretrained, run)]
    assert n_lines[0] == n_lines[1]


def test_settings_come_from_toml(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.toml"
    mixture = '[group_weights]\nkey = "cell_type"\ntemperature = 0.5\n'
    config.write_text(f'schedule = "cosine"\nsteps = 3\nlr = 1e-3\nn_shards = 8\nshuffle_cells = 1000\n{mixture}')
    run = tmp_path / "run"
    arguments = ("pretrain", data, "--size", "tiny", "--config", config, "--run-dir", run)
    assert call(*arguments).exit_code == 0
    found = json.loads((run / "spec.json").read_text())["train"]
    assert (found["schedule"], found["n_shards"], found["shuffle_cells"]) == ("cosine", 8, 1000)
    assert found["group_weights"] == {"key": "cell_type", "temperature": 0.5}
    given_twice = call(*arguments, "--lr", 1e-4)
    assert given_twice.exit_code == 2
    assert re.search(naming("lr", "0.0001", "0.001"), given_twice.stderr)


def test_dry_run_tells_the_cost_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = sorted(tmp_path.iterdir())
    text = call("pretrain", data, "--size", "tiny", "--epochs", 2, "--run-dir", run, "--dry-run").stdout
    assert "GFLOP per cell" in text
    assert "2 of 64 cells (2.0 epochs)" in text
    assert f"-m scllm run {run}" in text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", ["scgpt", "gpt2"])  # the second one needs medians of the data
def test_a_written_run_is_started_by_the_printed_line(data: Path, tmp_path: Path, family: str) -> None:
    run, whole = tmp_path / "my run", tmp_path / "whole"
    options = ("--model", family, "--size", "tiny", "--epochs", 2, "--device", "cpu", "--run-dir")
    written = call("pretrain", data, *options, run, "--write-only")
    assert written.exit_code == 0, written.output
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    # what new scgpt models learn their similarities from
    assert names == {"spec.json", "cells.npz", "model"} | ({"reference.npz"} if family == "scgpt" else set())
    alone, together = (line.strip() for line in written.stdout.splitlines() if line.startswith("  "))
    assert together.endswith(alone.removeprefix("python "))
    # the same call may be repeated, and changes nothing
    assert call("pretrain", data, *options, run, "--write-only").stdout == written.stdout
    started = subprocess.run(shlex.split(alone), capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    assert call("pretrain", data, *options, whole).exit_code == 0
    assert (run / "spec.json").read_text() == (whole / "spec.json").read_text()
    curves = [pd.read_json(path / "history.jsonl", lines=True) for path in (run, whole)]
    np.testing.assert_allclose(curves[0]["loss"], curves[1]["loss"], rtol=1e-6)
    assert "is finished" in call("pretrain", data, *options, run, "--write-only").stdout


def test_a_family_of_another_package_is_named_in_the_printed_lines(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "tiny.py").write_text(
        "from scllm.models.scgpt import FINETUNE, PRETRAIN, SIZES, Config\n"
        "from scllm.models import scgpt\n\n\nclass Model(scgpt.Model):\n    family = 'mylab.tiny'\n"
    )
    run = tmp_path / "run"
    written = shell(
        "pretrain", data, "--model", "mylab.tiny", "--size", "tiny", "--run-dir", run, "--write-only",
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    assert written.returncode == 0, written.stderr
    lines = [line for line in written.stdout.splitlines() if line.startswith("  ")]
    assert len(lines) == 2
    assert all(line.endswith(f"-m scllm run {run} --family mylab.tiny") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "DATA", "--dry-run", "--write-only"), "--dry-run or --write-only"),
        (("pretrain", "absent.h5ad"), "does not exist"),
        (("pretrain", "DATA", "--size", "huge"), "'huge'"),
        (("pretrain", "DATA", "--config", "absent.toml"), " absent.toml "),
        (("pretrain", "DATA", "--mask-ratio", "2"), "mask_ratio"),
        (("pretrain", "DATA", "--layer", "raw"), "layer 'raw' in"),
        (("pretrain", "DATA", "--n-gpus", "99"), "got 99"),
        (("pretrain", "DATA", "--bogus"), "No such option: --bogus"),
        (("embed", "DATA"), "`scllm embed DATA... MODEL`"),
        (("finetune", "DATA", "MODEL"), "Missing option '--key'"),
        (("finetune", "DATA", "MODEL", "--key", "celltype"), "Did you mean 'cell_type'?"),
        (("finetune", "DATA", "MODEL", "--key", "cell_type", "--loss", "ce=x"), "ce=x"),
        (("classify", "DATA", "MODEL", "--out", "labels.csv"), "a scgpt model"),
        (("embed", "DATA", "MODEL", "--out", "e.txt"), "e.txt"),
        (("embed", "DATA", "MODEL", "--out", "absent/e.npy"), "absent/e.npy"),
        (("embed", "DATA", "absent", "--out", "e.npy"), " absent"),
        (("info", "absent"), " absent"),
        (("run", "absent"), "absent' has no spec.json"),
        (("nonsense",), "No such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, message, data: Path, tmp_path: Path, monkeypatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"DATA": data}
    if "MODEL" in arguments:
        places["MODEL"] = request.getfixturevalue("pretrained")
    before = sorted(tmp_path.rglob("*"))
    done = call(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_failures_elsewhere_are_one_line_and_exit_code_1(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "absent").unlink()
    assert _exit_code(caught.value) == 1
    assert _one_line(RuntimeError("the disk is full\nand so on")) == "the disk is full"


def test_debug_shows_the_traceback() -> None:
    done = call("pretrain", "absent.h5ad", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr


def test_shell_sees_errors_on_stderr_without_a_traceback(tmp_path: Path) -> None:
    done = shell("pretrain", tmp_path / "absent.h5ad")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_commands_say_what_they_do_and_verbose_ones_say_details(data: Path, pretrained: Path, tmp_path: Path) -> None:
    usual = shell("embed", data, pretrained, "--out", tmp_path / "e.npy")
    told = shell("embed", data, pretrained, "--out", tmp_path / "e.npy", "--verbose")
    assert usual.stderr.startswith("embedding 60 cells (X, 40 of 40 genes matched")
    assert usual.stderr.count("\n") == 1
    assert "40 of 40 genes by var_names" in told.stderr


@pytest.mark.slow
def test_demo_draws_scores_and_continues(tmp_path: Path, monkeypatch) -> None:
    from scllm.cli._demonstration import demonstrate

    monkeypatch.chdir(tmp_path)
    tables = [demonstrate(tmp_path / "demo", pretrain_epochs=1, finetune_epochs=1) for _ in range(2)]
    assert tables[0].splitlines()[:-1] == tables[1].splitlines()[:-1]
    for line in ("NMI", "mean of the six", "held-out cells", "macro F1", "logistic regression"):
        assert line in tables[0]
    for name in (
        "loss_curves.png",
        "umap.png",
        "confusion_matrix.png",
        "embedding.h5ad",
        "pretrain/done",
        "finetune/done",
    ):
        assert (tmp_path / "demo" / name).exists()
    assert {"X_scllm", "X_pca"} <= set(ad.read_h5ad(tmp_path / "demo" / "embedding.h5ad").obsm)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_soma_is_read_and_cannot_be_written_into(data: Path, pretrained: Path, tuned: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiledbsoma", reason="needs the extra 'census'")
    from somas import write_soma

    write_soma(ad.read_h5ad(data), tmp_path / "soma")
    done = [
        call("embed", place, pretrained, "--out", tmp_path / f"{number}.npy")
        for number, place in enumerate((data, tmp_path / "soma"))
    ]
    assert [one.exit_code for one in done] == [0, 0], done[1].output
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    for command, model, out in (("embed", pretrained, "a.h5ad"), ("classify", tuned, "a.csv")):
        refused = call(command, tmp_path / "soma", model, "--out", tmp_path / out)
        assert refused.exit_code == 2
        assert re.search(naming(tmp_path / "soma", "--out .npy"), refused.output)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_processes_share_the_cells_of_one_embedding(data: Path, pretrained: Path, tmp_path: Path, suffix: str) -> None:
    out, alone = tmp_path / f"shared{suffix}", tmp_path / f"alone{suffix}"
    assert call("embed", data, pretrained, "--out", alone).exit_code == 0
    command = [sys.executable, "-m", "scllm", "embed", str(data), str(pretrained), "--out", str(out)]
    ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "3"}) for rank in range(3)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0, 0]
    found, expected = (np.load(path) if suffix == ".npy" else zarr.open_array(path)[:] for path in (out, alone))
    np.testing.assert_array_equal(found, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alone.name, out.name]


def test_processes_do_not_share_a_copy_of_the_data(
    data: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused = call("embed", data, pretrained, "--out", tmp_path / "a.h5ad")
    assert refused.exit_code == 2
    assert re.search(naming("a.h5ad", "WORLD_SIZE=3", ".npy"), refused.output)
