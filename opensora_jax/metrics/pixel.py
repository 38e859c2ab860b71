"""Pixel-wise similarity of two videos: PSNR and SSIM."""

import numpy as np

_WINDOW = 11  # pixels; with a Gaussian of 1.5 pixels, as in the paper
_SIGMA = 1.5


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over a whole video; infinite for equal videos.

    Args:
      a, b: uint8 (T, H, W, 3).

    Raises:
      ValueError: not two uint8 videos of one shape.
    """
    _check(a, b)
    squared_error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / squared_error)) if squared_error else float("inf")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity over frames and channels, at most 1 (equal videos).

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity":
    an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, at the positions where the window
    lies inside the frame.

    Args:
      a, b: uint8 (T, H, W, 3), H and W at least 11.

    Raises:
      ValueError: not two uint8 videos of one shape, or smaller than the window.
    """
    _check(a, b)
    if min(a.shape[1:3]) < _WINDOW:
        raise ValueError(f"video of shape {a.shape}: SSIM needs H and W of at least {_WINDOW}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast_structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float(np.mean(luminance * contrast_structure))


def _blur(video_THWC):
    """Gaussian window along H and W, only where it lies inside."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    window /= window.sum()
    for axis in (1, 2):
        n_out = video_THWC.shape[axis] - _WINDOW + 1
        video_THWC = sum(
            weight * np.take(video_THWC, range(i, i + n_out), axis)
            for i, weight in enumerate(window)
        )
    return video_THWC


def _check(a, b):
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"videos are {a.dtype} {a.shape} and {b.dtype} {b.shape}: "
            "expected two uint8 (T, H, W, 3) of one shape"
        )
