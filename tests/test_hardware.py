"""Peaks of the accelerators."""

import pytest

from opensora_jax import hardware


@pytest.mark.parametrize(
    ("device_kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
    ],
)
def test_peaks(device_kind, tera):
    assert hardware.peak_flops(device_kind) == tera * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "TPU v9"])
def test_what_is_not_known_is_not_guessed(device_kind):
    assert hardware.peak_flops(device_kind) is None
