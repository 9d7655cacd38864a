"""MFU's peaks, by the names that real devices report."""

from types import SimpleNamespace

import pytest
import torch

from minimind_fast.commands import plan
from minimind_fast.ops import cards

REPORTED = {
    "Tesla V100-SXM2-16GB": 125, "Tesla V100-SXM2-32GB": 125, "Tesla V100-PCIE-16GB": 112, "Tesla V100S-PCIE-32GB": 130,
    "Tesla T4": 65, "NVIDIA GeForce RTX 2080 Ti": 53.8, "NVIDIA GeForce RTX 3080": 59.5,
    "NVIDIA GeForce RTX 3090": 71, "NVIDIA GeForce RTX 3090 Ti": 80, "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA GeForce RTX 5080": 112.6, "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA RTX A6000": 154.8, "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA A30": 165, "NVIDIA A40": 149.7,
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "A100-SXM4-40GB": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA A800-SXM4-80GB": 312, "NVIDIA A800 80GB PCIe": 312,
    "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362,
    "NVIDIA H20": 148, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835,
    "NVIDIA H800": 989, "NVIDIA H800 PCIe": 756, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 120GB": 989, "NVIDIA GH200 480GB": 989, "NVIDIA B200": 2250, "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA GB200": 2500, "NVIDIA GB300": 2500, "AMD Instinct MI210": 181, "AMD Instinct MI300X": 1307,
}  # fmt: skip
OTHERS = [
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce RTX 2080",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A2", "NVIDIA L20", "Tesla P100-PCIE-16GB", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "NVIDIA A1000",
]  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_a_card_has_its_own_peak(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    for dtype in (torch.bfloat16, torch.float16):
        peak, how = cards.peak_flops(torch.device("cuda"), dtype)
        assert peak == REPORTED[name] * 1e12 and how.endswith(" data sheet")


@pytest.mark.parametrize("name", OTHERS)
def test_another_card_is_taken_for_none(name):
    assert cards.model_of(name) not in cards.PEAK_TFLOPS


def test_every_peak_is_some_card_s():
    """But those of which no reported name is at hand."""
    unseen = set(cards.PEAK_TFLOPS) - {cards.model_of(name) for name in REPORTED}
    assert unseen == {"MI250X", "MI325X"}


def test_what_is_not_in_the_table_is_measured():
    peak, how = cards.peak_flops(torch.device("cpu"), torch.float32)
    assert peak > 1e8 and how == "measured, 1024^3 matmul"


@pytest.mark.parametrize(
    ("name", "gib", "taken"),
    [("NVIDIA A100-SXM4-80GB", 79.3, True), ("NVIDIA A100-SXM4-40GB", 39.4, False), ("NVIDIA H100 NVL", 93.1, False)],
)
def test_plan_takes_a_data_sheet_only_for_the_card_that_it_describes(monkeypatch, name, gib, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))

    def measure(*_):
        raise LookupError

    monkeypatch.setattr(plan, "peak_flops", measure)
    if taken:
        assert plan.this_machine("bfloat16")[0].name == "A100"
    else:
        with pytest.raises(LookupError):
            plan.this_machine("bfloat16")
