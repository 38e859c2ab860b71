import numpy as np
import pytest

from opensora_jax.metrics.pixel import psnr, ssim


def pair():
    y, x = np.mgrid[:20, :24]
    a = np.stack(
        [np.stack([(8 * x + 20 * t), (10 * y), (x * y + t)], -1) % 256 for t in range(3)]
    ).astype(np.uint8)
    pattern = ((7 * x + 13 * y) % 41 - 20)[None, ..., None]
    return a, np.clip(a.astype(int) + pattern, 0, 255).astype(np.uint8)


def test_golden_numbers():
    """From the formulas written out with scipy.signal.convolve2d and a 2-D Gaussian window."""
    a, b = pair()
    assert psnr(a, b) == pytest.approx(26.86082858977201, abs=1e-9)
    assert ssim(a, b) == pytest.approx(0.7926483988989574, abs=1e-9)


def test_equal_videos():
    a, _ = pair()
    assert psnr(a, a) == float("inf")
    assert ssim(a, a) == pytest.approx(1)


def test_constant_offset():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    b = np.full((2, 16, 16, 3), 110, np.uint8)
    assert psnr(a, b) == pytest.approx(20 * np.log10(255 / 10))
    c1 = (0.01 * 255) ** 2  # plain videos: only the luminance term is left
    assert ssim(a, b) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))


def test_symmetric_and_falling_with_noise():
    a, b = pair()
    assert psnr(a, b) == psnr(b, a)
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    rng = np.random.default_rng(0)
    noisy = [
        np.clip(a + rng.normal(0, sigma, a.shape), 0, 255).astype(np.uint8) for sigma in (2, 10, 50)
    ]
    for metric in (psnr, ssim):
        values = [metric(a, n) for n in noisy]
        assert values == sorted(values, reverse=True)


def test_ssim_sees_structure_where_psnr_does_not():
    a, _ = pair()
    shifted = (a.astype(int) // 2 + 64).astype(np.uint8)
    error = np.sqrt(np.mean((shifted - a.astype(float)) ** 2))
    signs = np.random.default_rng(0).choice([-1, 1], a.shape)
    noisy = np.clip(a + error * signs, 0, 255).astype(np.uint8)
    assert ssim(a, shifted) > ssim(a, noisy) + 0.2


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "other",
    [np.zeros((3, 20, 24, 3), np.float32), np.zeros((2, 20, 24, 3), np.uint8)],
)
def test_different_videos_are_refused(metric, other):
    with pytest.raises(ValueError, match="expected two uint8"):
        metric(np.zeros((3, 20, 24, 3), np.uint8), other)


def test_too_small_for_ssim():
    tiny = np.zeros((2, 10, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(tiny, tiny)
