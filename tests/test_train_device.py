"""The process takes exactly the card that was asked for. There is none here: torch is told otherwise."""

import os

import pytest
import torch

pytest.importorskip("trl")

from nf4lora.cli.cards import choose_card
from nf4lora.compat.trl import OneDeviceConfig
from nf4lora.train.device import Device, choose_device
from nf4lora.train.errors import UsageError


class Cards:
    """What torch says of the cards of a machine. The driver reads CUDA_VISIBLE_DEVICES once: when it is started."""

    def __init__(self, count, started, monkeypatch):
        self.names = [str(each) for each in range(count)]
        self.seen = self.visible() if started else None
        self.current = 0
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr("nf4lora._C.CUDA_VERSION", "13.0")
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", self.count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.count() > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "set_device", self.set)

    def visible(self):
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return self.names
        return [name for name in wanted.split(",") if name in self.names]

    def count(self):
        self.seen = self.visible() if self.seen is None else self.seen
        return len(self.seen)

    def set(self, device):
        device = torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
        assert device.index < len(self.seen)
        self.current = device.index

    @property
    def used(self):
        return self.seen[self.current]


@pytest.mark.parametrize("started", [False, True], ids=["the driver sleeps", "the driver has started"])
@pytest.mark.parametrize(
    ("wanted", "visible", "card"),
    [
        ("cuda", None, "0"),
        ("auto", None, "0"),
        ("cuda:1", None, "1"),
        ("cuda:3", None, "3"),
        ("cuda:1", "2,3", "3"),
        ("cuda", "3,1", "3"),
    ],
)
def test_one_card_is_used_and_no_other(monkeypatch, tmp_path, started, wanted, visible, card):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    cards = Cards(4, started, monkeypatch)
    assert choose_card(wanted).kind == "cuda"
    assert cards.used == card
    assert started or cards.count() == 1  # the others are hidden
    arguments = OneDeviceConfig(output_dir=str(tmp_path), report_to=[], bf16=False)
    assert arguments.device == torch.device("cuda", cards.current)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, arguments.per_device_train_batch_size)
    assert cards.used == card


@pytest.mark.parametrize("started", [False, True])
def test_a_card_that_is_not_there_is_refused(monkeypatch, started):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Cards(2, started, monkeypatch)
    with pytest.raises(UsageError, match="device cuda:2: there (is no such card|are 2 CUDA devices)"):
        choose_card("cuda:2")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_without_a_card_auto_takes_the_processor(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Cards(0, False, monkeypatch)
    assert choose_card("auto") == Device("cpu", why="torch sees no CUDA device")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("wanted", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_a_function_that_trains_hides_no_card(monkeypatch, wanted, index):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = Cards(4, False, monkeypatch)
    assert choose_device(wanted) == Device("cuda", index)
    assert cards.current == 0
    assert cards.count() == 4
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_card_that_is_not_there_is_refused_where_it_is_the_only_one(monkeypatch):
    Cards(1, False, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for choose in (choose_card, choose_device):
        with pytest.raises(UsageError, match="device cuda:1: there are 1 CUDA devices, counted from 0"):
            choose("cuda:1")
