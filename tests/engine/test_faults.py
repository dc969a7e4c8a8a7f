"""Faults of runs with two processes: nothing more is lost than the steps since the last checkpoint."""

from __future__ import annotations

import re

import pytest
from engine.faults import CONFIG, FAULTS, SETTINGS, STEP, ranks_with_different_directories, suffer
from engine.runs import assert_same_curve, curve, pretrain
from messages import naming

from scllm.engine.run import Run


@pytest.fixture(scope="module")
def expected(_toy, tmp_path_factory):
    """The history of a run to which nothing happens."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    pretrain(_toy.copy(), run_dir, config=CONFIG, **SETTINGS)
    return curve(run_dir)


# the others are provoked by `python -m benchmarks.faults`, or in the tests of resuming and of checkpoints
@pytest.mark.parametrize("name", ["one rank raises alone", "SIGTERM to the parent"])
def test_a_fault_costs_the_steps_since_the_last_checkpoint(expected, tmp_path, name):
    fault, outcome = FAULTS[name], suffer(name, tmp_path)
    assert outcome.exit_code in fault.exit_codes, outcome.output
    assert re.search(naming(*fault.cause), outcome.output)
    assert not outcome.orphans
    assert STEP - 3 <= outcome.saved
    assert outcome.n_lost <= (0 if name.startswith("SIGTERM") else 3)
    assert_same_curve(outcome.resumed, expected)


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(toy, tmp_path, monkeypatch):
    outcome = suffer("NaN on one rank", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert re.search(naming("not finite", f"step {STEP + 1}", "1 left out"), outcome.output)
    assert STEP + 1 not in outcome.resumed["step"].tolist()
    # a single process leaves out the same step
    monkeypatch.setenv("FAULT", f"nan:{STEP}:0:{tmp_path / 'run'}")
    with pytest.warns(UserWarning, match=naming("not finite", f"step {STEP + 1}")):
        pretrain(toy, tmp_path / "alone", config=CONFIG, **SETTINGS)
    assert Run(tmp_path / "alone").is_done
    assert_same_curve(outcome.resumed, curve(tmp_path / "alone"))


def test_ranks_with_different_directories_end_with_an_error_that_says_so(tmp_path):
    output = ranks_with_different_directories(tmp_path)
    assert re.search(naming("same step", "got 7 on rank 0 and 6 on rank 1", "share"), output)
