"""VGG's weights, and the distance that they make, against its definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import signal

from opensora_jax.convert.vgg import load_perceptual

# As VGG16's first stages, with fewer channels: torchvision numbers ReLUs and poolings as well.
CHANNELS = {0: (3, 4), 2: (4, 5), 5: (5, 6), 7: (6, 4), 10: (4, 3)}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def make_weights(seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for number, (d_in, d_out) in CHANNELS.items():
        kernel = rng.normal(0, (2 / (9 * d_in)) ** 0.5, (d_out, d_in, 3, 3))
        made[f"features.{number}.weight"] = kernel.astype(np.float32)
        made[f"features.{number}.bias"] = rng.normal(0, 0.1, d_out).astype(np.float32)
    return made


def make_channel_weights(seed=1):
    rng = np.random.default_rng(seed)
    sizes = (5, 4, 3)
    return {
        f"lin{k}.model.1.weight": rng.uniform(0, 1, (1, n, 1, 1)).astype(np.float32)
        for k, n in enumerate(sizes)
    }


def features(weights, image_HWC):
    """Of each stage, (H, W, C)."""
    x = ((image_HWC + 0.5 - MEAN) / STD).transpose(2, 0, 1)
    found = []
    for number in CHANNELS:
        if number in (5, 10):
            found.append(x)
            c, h, w = x.shape
            x = x.reshape(c, h // 2, 2, w // 2, 2).max(axis=(2, 4))
        kernel, bias = (weights[f"features.{number}.{k}"] for k in ("weight", "bias"))
        x = np.maximum(
            [
                sum(signal.correlate2d(x[i], k[i], "same") for i in range(len(x))) + b
                for k, b in zip(kernel, bias, strict=True)
            ],
            0,
        )
    return [*found, x]


def distance(weights, a, b, channel_weights):
    total = 0.0
    for k, (x, y) in enumerate(zip(features(weights, a), features(weights, b), strict=True)):
        x, y = (z / np.sqrt((z**2).sum(axis=0, keepdims=True) + 1e-10) for z in (x, y))
        w = channel_weights.get(f"lin{k}.model.1.weight", np.ones((1, len(x), 1, 1))).reshape(-1)
        total += np.mean(np.tensordot(w, (x - y) ** 2, 1))
    return total


@pytest.mark.parametrize("has_channel_weights", [False, True])
def test_the_distance_is_that_of_its_definition(tmp_path, has_channel_weights):
    weights, channel_weights = make_weights(), {}
    save_file(weights | {"classifier.0.weight": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    if has_channel_weights:
        channel_weights = make_channel_weights()
        save_file(channel_weights, tmp_path / "lpips.safetensors")
    (tmp_path / "README.md").write_text("no weights")
    found = load_perceptual(tmp_path)
    a, b = np.random.default_rng(2).uniform(-0.5, 0.5, (2, 16, 24, 3))
    expected = distance(weights, a, b, channel_weights)
    batch = jnp.stack([a, a]).astype(jnp.float32), jnp.stack([b, a]).astype(jnp.float32)
    assert float(found(*batch)) == pytest.approx(expected / 2, rel=1e-4)
    assert float(found(batch[0], batch[0])) == 0
    grad = jax.grad(lambda x: found(x, batch[1]))(batch[1])  # where it is nothing, no gradient is
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.clear(), "no features.N.weight"),
        (lambda w: w.pop("features.2.bias"), "'features.2.bias': expected finite"),
        (lambda w: w.update({"features.7.bias": np.ones(3, np.float32)}), "features.7: "),
        (lambda w: w.update({"features.20.weight": w["features.10.weight"]}), "features.10 and"),
        (lambda w: w.update({"lin0.model.1.weight": np.ones(3, np.float32)}), "lin0"),
        (lambda w: w["features.5.weight"].fill(np.nan), "'features.5.weight': expected finite"),
    ],
)
def test_what_is_no_vgg_is_told(tmp_path, change, message):
    weights = make_weights()
    change(weights)
    save_file(weights or {"a": np.ones(1, np.float32)}, tmp_path / "vgg.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}/vgg.safetensors: .*{message}"):
        load_perceptual(tmp_path / "vgg.safetensors")
    with pytest.raises(FileNotFoundError, match="expected VGG's weights"):
        load_perceptual(tmp_path / "nothing")
