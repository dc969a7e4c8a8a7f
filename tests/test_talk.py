"""What scllm says, when, and where: log lines, warnings and progress bars under ``settings.verbosity``."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from messages import naming

import scllm
from scllm._log import details, log, warn

SOURCE = Path(scllm.__file__).parents[1]
EMBED = """
import scllm
adata = scllm.datasets.toy(n_cells=60)
model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
"""


def said(script: str, *flags: str, source: Path = SOURCE, **environment: str) -> list[str]:
    """Lines on stderr of a Python process; it must succeed."""
    # one thread: processes of several share what is there
    env = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, *flags, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    # put back afterwards
    monkeypatch.setattr(scllm.settings, "verbosity", 2)
    return scllm.settings


@pytest.fixture
def adata():
    return scllm.datasets.toy(n_cells=60)


@pytest.fixture
def tiny(adata):
    return scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")


def test_import_leaves_logging_alone_and_a_verb_says_one_line():
    lines = said(
        """
import logging, scllm
from scllm import datasets, get, metrics, models, pl, pp, tl
logger = logging.getLogger("scllm")
assert not logger.handlers and logger.level == logging.NOTSET and not logging.getLogger().handlers
"""
        + EMBED
        + "adata = adata[:, :150].copy(); adata.layers['raw_counts'] = adata.X\n"
        "scllm.tl.embed(adata, model, layer='raw_counts')\n"
        "assert len(logger.handlers) == 1"
    )
    (line,) = (line for line in lines if not line.startswith("compiling"))
    for what in ("embedding 60 cells", "layer 'raw_counts'", "150 of 150 genes", "tokens a cell", "fp32 on the CPU"):
        assert what in line
    assert line.endswith("a few seconds")


def test_lines_are_shown_once_whatever_the_application_configures():
    script = """
import logging, scllm
from scllm._log import log
log.info("first line")
logging.basicConfig(format="root: %(message)s")
log.info("second line")
own = logging.StreamHandler()
logging.getLogger("scllm").addHandler(own)
logging.getLogger("scllm").propagate = False
log.info("third line")
logging.getLogger("scllm").removeHandler(own)
log.info("fourth line")
"""
    assert said(script) == ["first line", "root: second line", "third line", "fourth line"]


def test_handlers_that_hide_info_do_not_keep_it_from_the_user():
    script = """
import logging, scllm
from scllm._log import log
logging.basicConfig(format="root: %(message)s")
logging.getLogger().handlers[0].setLevel(logging.WARNING)
log.info("embedding")
log.warning("beware")
"""
    assert said(script) == ["embedding", "root: beware"]


def test_an_application_may_silence_the_logger():
    assert (
        said("import logging\nlogging.getLogger('scllm').setLevel('ERROR')\n" + EMBED + "scllm.tl.embed(adata, model)")
        == []
    )


def test_verbosity_takes_effect_at_any_time(adata, tiny, settings, caplog):
    levels = {}
    for verbosity in (3, 0, 1, 2):
        settings.verbosity = verbosity
        caplog.clear()
        scllm.tl.embed(adata, tiny)
        log.warning("a warning")
        log.error("an error")
        levels[verbosity] = {record.levelname for record in caplog.records}
    assert levels[0] == {"ERROR"}
    assert levels[1] == {"ERROR", "WARNING"}
    assert levels[2] == {"ERROR", "WARNING", "INFO"}
    assert levels[3] == {"ERROR", "WARNING", "INFO", "DEBUG"}


def test_verbosity_that_is_no_number_is_named(settings):
    settings.verbosity = "info"
    with pytest.raises(TypeError, match="'info'"):
        log.info("a line")


def test_verbosity_zero_silences_warnings_too(settings):
    with pytest.warns(UserWarning, match="beware"):
        warn("beware")
    settings.verbosity = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("beware")


def test_lines_of_a_verb_inside_another_are_details(settings, caplog):
    with details():
        log.info("inner")
        assert not caplog.records
        settings.verbosity = 3
        log.info("inner")
    log.info("outer")
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.DEBUG, "inner"), (logging.INFO, "outer"),
    ]  # fmt: skip


def test_training_says_once_what_it_reads_and_takes(adata, tmp_path, caplog):
    adata.X = adata.X.tocsr()
    scllm.tl.pretrain(adata, size="tiny", epochs=2, batch_size=32, run_dir=tmp_path / "run", device="cpu")
    (line,) = (line for line in caplog.messages if line.startswith("training"))
    for what in ("scgpt", "200 of 200 genes", "2 epochs of 32 cells", "fp32 on the CPU", "GFLOP a cell"):
        assert what in line
    assert f"writing the run to {tmp_path / 'run'}" in caplog.messages
    caplog.clear()
    scllm.tl.pretrain(adata, size="tiny", epochs=2, batch_size=32, run_dir=tmp_path / "run", device="cpu")
    (line,) = caplog.messages
    assert str(tmp_path / "run") in line  # returned as it is, which is said


def test_training_that_predicts_worse_than_the_mean_of_each_gene_says_so(adata, tmp_path, caplog):
    options = {"size": "tiny", "epochs": 1, "validation": 0.2, "device": "cpu"}
    config = scllm.tl.TrainConfig(relational=False)
    model = scllm.tl.pretrain(adata, run_dir=tmp_path / "run", config=config, **options)
    validation = model.history.query("split == 'validation'")
    assert validation["loss"].item() > validation["mean_prediction"].item()
    assert re.search(naming(f"{validation['mean_prediction'].item():.4g}", "mean", "lr"), caplog.messages[-1])


def test_folds_do_not_repeat_what_the_first_has_said(adata, tiny, tmp_path, caplog):
    scllm.tl.cross_validate(adata, tiny, key="cell_type", n_folds=3, epochs=1, run_dir=tmp_path / "cv")
    first = [line.split()[0] for line in caplog.messages if not line.startswith(("epoch", "compiling"))]
    assert first == ["cross-validating", "training", "writing", "trained", "fold", "fold", "fold"]


@pytest.mark.slow
def test_several_processes_speak_once(tmp_path):
    run = f"size='tiny', epochs=1, n_procs=2, device='cpu', run_dir={str(tmp_path / 'run')!r}"
    lines = [line for line in said(f"{EMBED}scllm.tl.pretrain(adata, {run})") if not line.startswith("compiling")]
    assert [line.split()[0] for line in lines] == ["training", "writing", "to", "trained"]
    assert "on 2 CPU processes" in lines[0]


@pytest.mark.parametrize("family", ["scgpt", "gpt2"])
def test_a_plain_embedding_prints_nothing_of_other_packages(family):
    """Where transformers, peft and torchao are installed; Python's own warnings are on."""
    unused = {"bitsandbytes", "datasets"} | ({"peft", "torchao", "transformers"} if family == "scgpt" else set())
    embed = EMBED.replace("scgpt", family) + "scllm.tl.embed(adata, model)\n"
    lines = said(f"{embed}import sys\nassert not {unused} & set(sys.modules)", "-W", "default")
    assert [line.split()[0] for line in lines if not line.startswith("compiling")] == ["embedding"]


BIN = """
import scllm
adata = scllm.datasets.toy(n_cells=20)
scllm.pp.bin_expression(adata)
"""


@pytest.mark.slow
def test_compiling_is_said_when_kernels_are_compiled_and_kept_for_the_next_process(tmp_path):
    first, second = (said(BIN, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert [line.split()[:2] for line in first] == [["compiling", "numba"]]
    assert second == []


@pytest.fixture
def read_only(tmp_path):
    """The package in a place where no compiled code can be kept; file modes do not stop root."""
    shutil.copytree(SOURCE / "scllm", tmp_path / "scllm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "scllm" / "kernels" / "__pycache__").touch()
    return tmp_path


@pytest.mark.slow
def test_kernels_of_a_read_only_package_are_kept_in_the_users_cache(read_only, tmp_path):
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / "cache")}
    first, second = (said(BIN, source=read_only, **home) for _ in range(2))
    assert (len(first), second) == (1, [])
    assert list((tmp_path / "home").rglob("*.nbi"))


@pytest.mark.slow
def test_kernels_run_where_nothing_can_be_kept(read_only):
    (line,) = said(BIN, source=read_only, HOME="/dev/null", XDG_CACHE_HOME="/dev/null/cache")
    assert "NUMBA_CACHE_DIR" in line
