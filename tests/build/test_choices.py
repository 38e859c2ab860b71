"""What "auto" means for these latents, and that a training that was begun keeps what it has."""

import logging

import numpy as np
import pytest

from configs import default, dit_3b, dit_7b, dit_xl2, msrvtt, quickstart
from opensora_jax import config as config_lib
from opensora_jax.build import networks
from opensora_jax.build import training as build
from opensora_jax.diffusion.objectives import RectifiedFlow
from opensora_jax.models.dit import DiTConfig
from opensora_jax.tasks.dit import Latents


def codebook(n_codes, dim, rank, seed=0):
    """Codes that lie, nearly, in so many dimensions, and how often each occurs."""
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((n_codes, rank)) @ rng.standard_normal((rank, dim))
    table = low + 1e-3 * rng.standard_normal((n_codes, dim))
    return table.astype(np.float32), rng.integers(1, 50, n_codes)


def config(width=768, **given):
    c = default.get_config().dit
    c.update(size="", depth=1, width=width, heads=width // 128, **given)
    return c


def test_components_hold_the_variance_and_tell_the_codes_apart():
    table, counts = codebook(512, 64, rank=6)
    latents = build.latents(config(), table, counts)
    assert latents.channels <= 6
    whole = Latents.normalized(table, counts)
    assert whole.channels == 64
    share = counts / counts.sum()
    for found in (latents, whole):
        np.testing.assert_allclose(share @ found.table, 0, atol=1e-4)
        np.testing.assert_allclose((share @ found.table**2).mean(), 1, rtol=1e-4)
    codes = np.arange(512)
    np.testing.assert_array_equal(latents.to_codes(latents.from_codes(codes)), codes)
    # Distances are those of the whole, but for their scale and what is left out.
    pairs = np.random.default_rng(1).integers(0, 512, (2, 100))
    distances = [
        np.linalg.norm(t[pairs[0]] - t[pairs[1]], axis=1) for t in (latents.table, whole.table)
    ]
    assert np.corrcoef(*distances)[0, 1] > 0.99


def test_two_codes_are_hidden_where_theory_says():
    """+1 and -1: right half the time, or better, at any noise; of 4 corners, where both are."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    level = Latents(corners).hidden_level(np.ones(4), n=20_000)
    # Right in both signs: Phi(s)**2 = 1/2 for the signal over noise s = (1 - t) / t = 0.5449.
    assert level == pytest.approx(1 / (1 + 0.5449), abs=0.02)


def test_what_is_chosen_is_told_with_its_figures(caplog):
    caplog.set_level(logging.INFO, "opensora_jax")
    table, counts = codebook(2048, 256, rank=256)
    latents = Latents.normalized(table, counts)
    chosen = build.choose(config(patch=2, components=0), latents, counts)
    assert chosen.prediction == "data"
    assert chosen.time_shift == 16  # half the root of 1024
    assert "data, for tokens of 1024 numbers in a network of width 768" in caplog.text
    assert "time_shift: 16.00, for tokens of 1024 numbers; half of the codes alone" in caplog.text
    few = build.latents(config(), *codebook(2048, 256, rank=4))
    chosen = build.choose(config(patch=2), few, counts)
    assert (chosen.prediction, chosen.time_shift) == ("velocity", max(1, few.channels**0.5))


def test_ddpm_gives_the_data():
    few = build.latents(config(), *codebook(2048, 256, rank=4))
    chosen = build.choose(config(patch=2, objective="ddpm"), few)
    assert (chosen.prediction, chosen.time_shift) == ("data", 1.0)
    chosen = build.choose(config(patch=2, objective="ddpm", prediction="noise"), few)
    assert chosen.prediction == "noise"


def test_what_cannot_represent_its_target_is_told(caplog):
    table, counts = codebook(64, 256, rank=256)
    latents = Latents.normalized(table, counts)
    c = config(patch=2, components=0, prediction="velocity", time_shift=3.0)
    chosen = build.choose(c, latents, counts)
    assert (chosen.prediction, chosen.time_shift) == ("velocity", 3.0)
    (record,) = caplog.records
    assert (
        "a token holds 1024 numbers, of which a network of width 768 can give 768" in record.message
    )
    assert "of the noise 25% is out of reach" in record.message


def test_a_training_that_was_begun_keeps_what_it_has():
    sizes = {"channels": 256, "out_channels": 256, "patch": 2, "text_width": 8}
    model = DiTConfig(depth=28, width=1152, heads=16, **sizes)
    objective = RectifiedFlow(time_shift=1.0, prediction="velocity")
    c = default.get_config().dit
    c.size = "XL"
    kept = build.adopt(c, model, objective)
    assert (kept.prediction, kept.time_shift, networks.dit_size(kept)) == (
        "velocity",
        1.0,
        (28, 1152, 16),
    )
    c.size, c.prediction, c.time_shift = "B", "data", 2.0
    kept = build.adopt(c, model, objective)
    assert (kept.prediction, kept.time_shift, kept.size) == ("data", 2.0, "B")


@pytest.mark.parametrize(("size", "heads"), [("S", 3), ("B", 6), ("L", 8), ("XL", 9)])
def test_heads_are_of_128_unless_a_checkpoint_has_others(size, heads):
    c = default.get_config().dit
    c.size = size
    _, width, found = networks.dit_size(c)
    assert (found, width // found) == (heads, 128)
    c.init_from = "DiT.pt"
    assert networks.dit_size(c)[2] == {"S": 6, "B": 12, "L": 16, "XL": 16}[size]


@pytest.mark.parametrize("module", [default, msrvtt, dit_xl2, dit_3b, dit_7b])
def test_shipped_configurations_choose_by_the_data(module):
    c = module.get_config()
    assert (c.dit.prediction, c.dit.time_shift, c.dit.components) == ("auto",) * 3
    _, width, heads = networks.dit_size(c.dit)
    assert width // heads == 128


@pytest.mark.parametrize(
    ("field", "value"), [("time_shift", "none"), ("time_shift", 0), ("components", -1)]
)
def test_anything_else_than_auto_or_a_number_is_refused(field, value):
    c = quickstart.get_config()
    with c.ignore_type():
        c.dit[field] = value
    with pytest.raises(ValueError, match=rf"dit\.{field}={value!r}: expected auto, or "):
        config_lib.check(c)
