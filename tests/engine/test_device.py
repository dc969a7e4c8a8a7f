"""The device of each process, and what is refused before it fails inside CUDA."""

from __future__ import annotations

import pytest
import torch
from messages import naming

from scllm.engine.device import resolve_device


@pytest.fixture
def gpus(monkeypatch):
    """Torch finds some GPUs, and torchrun has started processes."""

    def set_up(available, n_processes=None, local_rank=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
        if n_processes is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_processes))
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return set_up


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_its_gpu(gpus, device):
    gpus(2, n_processes=2, local_rank=1)
    assert resolve_device(device) == torch.device("cuda:1")


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus_are_refused_on_every_rank(gpus, rank):
    gpus(1, n_processes=2, local_rank=rank)
    with pytest.raises(ValueError, match=naming("each of the 2 processes", "with 1 GPU.", "one process for each GPU")):
        resolve_device("cuda")


def test_one_gpu_for_all_processes_is_refused(gpus):
    gpus(2, n_processes=2)
    with pytest.raises(ValueError, match=naming("'cuda:0'", "2 processes", "device='cuda'")):
        resolve_device("cuda:0")


def test_one_process_may_name_its_gpu(gpus):
    gpus(2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    gpus(2, n_processes=1)
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_without_a_gpu_the_message_says_so(gpus):
    gpus(0, n_processes=2)
    with pytest.raises(ValueError, match=naming("'cuda", "finds none", "device='cpu'")):
        resolve_device("cuda")
