"""What heads read of a cell: states before the first block, after the last one, or both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scllm import models
from scllm.data.tokens import Tokens
from scllm.models.base import Batch, HeadSpec

POOLED = sorted(name for name in models.families() if models.build(name, vocab=["a"], size="tiny").head_pooling)


@pytest.fixture(params=POOLED)
def model(request):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return models.build(request.param, vocab=[f"g{i}" for i in range(9)], size="tiny").eval()


@pytest.fixture
def batch(model):
    genes = model.vocab.ids([f"g{i}" for i in range(7)])
    return Batch.from_tokens(Tokens(np.array([0, 3, 7]), genes, np.array([9, 5, 1, 8, 6, 4, 2], np.float32)))


def with_head(model, reads):
    model.set_heads([HeadSpec("cell_type", ("x", "y"), pooling=model.head_pooling, reads=reads)])
    return model.eval()


def test_some_families_have_heads_that_pool():
    assert {"scgpt", "geneformer", "gpt2"} <= set(POOLED)


@torch.no_grad()
@pytest.mark.parametrize("reads", ["inputs", "last", "both"])
def test_heads_read_the_states_they_say(model, batch, reads):
    model = with_head(model, reads)
    before = model.pool(model.hidden(batch, layer=-model.config.n_layers - 1), batch, model.head_pooling)
    after = model.pool(model.hidden(batch), batch, model.head_pooling)
    expected = {"inputs": before, "last": after, "both": torch.cat([before, after], dim=1)}[reads]
    torch.testing.assert_close(model.head_inputs(batch), expected)
    said = model.heads[0](expected)
    torch.testing.assert_close(model.head_outputs(batch)["cell_type"], said)
    torch.testing.assert_close(model(batch).heads["cell_type"], said)


def test_a_head_on_both_states_is_saved_with_its_width(model, batch, tmp_path):
    model = with_head(model, "both")
    model.save(tmp_path / "m")
    again = models.load(tmp_path / "m").eval()
    assert again.head_specs == model.head_specs
    with torch.no_grad():
        assert torch.equal(again.head_outputs(batch)["cell_type"], model.head_outputs(batch)["cell_type"])
