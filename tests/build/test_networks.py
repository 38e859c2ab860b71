"""What "auto" means where."""

import jax.numpy as jnp
import pytest

from opensora_jax.build import networks
from opensora_jax.models.dit import DiTConfig


def with_heads_of(size):
    return DiTConfig(
        depth=1, width=2 * size, heads=2, channels=4, out_channels=4, patch=2, text_width=8
    )


@pytest.mark.parametrize(
    ("platform", "head_size", "dtype", "expected"),
    [
        ("cpu", 64, jnp.float32, "xla"),
        ("gpu", 64, jnp.bfloat16, "cudnn"),
        ("gpu", 72, jnp.float16, "cudnn"),
        ("gpu", 64, jnp.float32, "xla"),
        ("gpu", 60, jnp.bfloat16, "xla"),
        ("gpu", 136, jnp.bfloat16, "xla"),
        ("tpu", 72, jnp.bfloat16, "splash"),
    ],
)
def test_auto_is_the_attention_that_the_device_can_do(platform, head_size, dtype, expected):
    config = with_heads_of(head_size)
    assert networks.attention_implementation("auto", config, dtype, platform) == expected
    assert networks.attention_implementation("xla", config, dtype, platform) == "xla"


@pytest.mark.parametrize(
    ("head_size", "dtype", "message"),
    [
        (64, jnp.float32, r"attention='cudnn': expected bfloat16 .*not float32"),
        (20, jnp.bfloat16, r"attention='cudnn': .*multiple of 8.*not 20"),
    ],
)
def test_heads_that_cudnn_cannot_do_are_refused(head_size, dtype, message):
    with pytest.raises(ValueError, match=message):
        networks.attention_implementation("cudnn", with_heads_of(head_size), dtype, "gpu")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", "xla"), ("gfx942", "xla"), ("8.0", "cudnn"), ("9.0", "cudnn"), ("12.0", "cudnn")],
)
def test_older_gpus_fall_back_and_say_so(capability, expected, caplog):
    caplog.set_level("INFO", "opensora_jax")
    config, dtype = with_heads_of(64), jnp.bfloat16
    found = networks.attention_implementation("auto", config, dtype, "gpu", capability)
    assert found == expected
    if expected == "cudnn":
        assert not caplog.records
        return
    (record,) = caplog.records
    assert "xla, since cuDNN's attention needs a GPU of compute capability" in record.message
    with pytest.raises(ValueError, match=f"cudnn': expected a GPU of .* not {capability}"):
        networks.attention_implementation("cudnn", config, dtype, "gpu", capability)


def test_auto_is_float32_on_cpus_only():
    assert networks.compute_dtype("auto") == jnp.float32  # where tests run
    assert networks.compute_dtype("auto", "tpu") == jnp.bfloat16
    assert networks.compute_dtype("float32", "tpu") == jnp.float32
