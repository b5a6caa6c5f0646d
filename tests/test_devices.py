import pytest
import torch

from mogan.devices import choose_device
from mogan.errors import UserError


def machine(monkeypatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)


@pytest.mark.parametrize(
    ("name", "rank", "gpus", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("cpu", 0, 2, "cpu"),
        ("auto", 0, 1, "cuda:0"),
        ("auto", 3, 4, "cuda:3"),
        ("cuda", 3, 1, "cuda:0"),  # a process that sees its own GPU alone
        ("cuda:1", 0, 2, "cuda:1"),
    ],
)
def test_what_a_name_means(monkeypatch, name, rank, gpus, expected):
    machine(monkeypatch, gpus)
    assert choose_device(name, rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "rank", "gpus", "says"),
    [
        ("cuda", 0, 0, "finds no GPU; try cpu"),
        ("cuda:2", 0, 2, "asks for GPU 2 and finds 2"),
        ("auto", 3, 2, "start one process per GPU"),
        ("tpu", 0, 1, "takes auto, cpu, cuda or cuda:N, not tpu"),
    ],
)
def test_what_is_not_there_is_one_sentence(monkeypatch, name, rank, gpus, says):
    machine(monkeypatch, gpus)
    with pytest.raises(UserError, match=says):
        choose_device(name, rank)
