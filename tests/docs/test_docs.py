"""What the documentation shows: doctests, and the README's lines."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scllm

ROOT = Path(__file__).parents[2]


def modules() -> list[str]:
    found = pkgutil.walk_packages(scllm.__path__, "scllm.")
    return sorted(module.name for module in found if module.name != "scllm.__main__")


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"scllm": scllm}, verbose=False)
    assert result.failed == 0


def test_public_functions_have_examples() -> None:
    names = [f"{space}.{name}" for space in ("pp", "tl", "pl", "datasets") for name in getattr(scllm, space).__all__]
    objects = {name: getattr(getattr(scllm, name.split(".")[0]), name.split(".")[1]) for name in names}
    without = [name for name, thing in objects.items() if callable(thing) and ">>>" not in (thing.__doc__ or "")]
    assert set(without) <= {"tl.TrainConfig", "tl.LoraSettings"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.slow
def test_six_lines_run(tmp_path: Path) -> None:
    (code,) = blocks("README.md", "python")
    assert blocks("docs/index.md", "python") == [code]
    code += "\nassert adata.obsm['X_umap'].shape == (700, 2)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_plausibility_loop_runs_as_it_is_written() -> None:
    """The loop of `docs/spatial.md`, with a network, an optimiser and a loader that are not of this package."""
    import torch

    (code,) = [block for block in blocks("docs/spatial.md", "python") if "optimizer.step()" in block]
    assert len(code.splitlines()) <= 10
    there: dict[str, object] = {"scllm": scllm, "gene_names": [f"g{i}" for i in range(12)]}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        there["lm"] = scllm.models.build("gpt2", vocab=there["gene_names"], size="tiny")
        network = torch.nn.Linear(3, 12)
        features, truth = torch.randn(64, 3), torch.rand(64, 12)
    there["network"], there["optimizer"] = network, torch.optim.SGD(network.parameters(), lr=0.1)
    there["loader"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, truth), batch_size=16)
    before = ((network(features) - truth) ** 2).mean().item()
    exec(code, there)
    assert ((network(features) - truth) ** 2).mean().item() < before


def test_the_loop_over_settings_runs_as_it_is_written() -> None:
    """The loop of `docs/spatial.md` chooses among all settings by the error on sections held out of the training."""
    (code,) = [block for block in blocks("docs/spatial.md", "python") if "min(errors" in block]
    assert len(code.splitlines()) <= 10
    train = scllm.datasets.toy_spatial(n_sections=3, side=5, n_genes=16)
    train.obsm["X_patch"] = train.obsm["programmes"]
    there: dict[str, object] = {"scllm": scllm, "train": train}
    exec(code, there)
    held_out = train.obs.loc[train.obs["split"] == "validation", "section"]
    assert held_out.value_counts().tolist() == [25, 0, 0]
    errors = there["errors"]
    assert isinstance(errors, dict)
    assert len(set(errors.values())) == 6
    # the last model's error is that of its predictions of the section that was held out
    scllm.tl.predict_spatial(train, there["model"])
    held = (train.obs["split"] == "validation").to_numpy()
    counts = train.X[held].toarray()
    measured = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    error = ((train.layers["predicted"][held] - measured) ** 2).mean()
    assert errors[0.3, 1e-3] == pytest.approx(error, rel=1e-4)


def test_commands_in_the_pages_exist() -> None:
    from scllm.cli import app

    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {
        name
        for page in pages
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for name in re.findall(r"^scllm ([a-z]+)", block, re.MULTILINE)
    }
    assert named
    assert named <= known


def test_every_public_name_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    spaces = ("pp", "tl", "pl", "get", "datasets", "models")
    missing = [
        f"{space}.{name}"
        for space in spaces
        for name in getattr(scllm, space).__all__
        if f"{space}.{name}\n" not in page
    ]
    assert not missing
