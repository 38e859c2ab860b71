"""Frames and latents agree, whatever the windows."""

import pytest

from opensora_jax.windows import Windows


def test_the_published_ones():
    assert Windows(4, True, 17).latents(17) == 5
    assert Windows(4, False, 16).latents(16) == 4
    assert Windows(4, True, 17).latents(1) == 1  # an image
    assert Windows(8, True, 49).latents(49) == 7


@pytest.mark.parametrize(
    "windows", [Windows(4, True, 17), Windows(4, False, 8), Windows(1, True, 5)]
)
def test_every_number_of_latents_has_its_frames(windows):
    for n in range(1, 40):
        assert windows.latents(windows.n_frames(n)) == n
        # And one frame fewer is not enough.
        assert windows.latents(windows.n_frames(n) - 1) < n
    assert windows.latents(0) == windows.n_frames(0) == 0


def test_what_fits():
    windows = Windows(4, True, 17)
    assert [windows.fit(n) for n in (1, 3, 5, 16, 17, 18, 20, 22, 34)] == [
        *(1, 1, 5, 13, 17, 18, 18, 22, 34)
    ]
    assert windows.near(16) == "1 and a multiple of 4 in windows of 17, such as 13 or 17"
    assert Windows(4, False, 16).near(15) == "a multiple of 4"


@pytest.mark.parametrize(("causal", "frames"), [(False, 6), (False, 0), (True, 16), (True, 0)])
def test_windows_that_no_latents_stand_for(causal, frames):
    with pytest.raises(ValueError, match=rf"^window={frames}: expected"):
        Windows(4, causal, frames)
