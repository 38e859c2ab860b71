"""The windows of longer videos: which latents each is told, and which frames are shown of it."""

import itertools

import numpy as np
import pytest

from opensora_jax.inference.frames import Given, borders, parts, unit
from opensora_jax.windows import Windows

STRIDES, WINDOW_LATENTS = (2, 4), (1, 2, 3, 4)


def cases(is_causal, most_latents=7, most_units=5):
    """(windows, latents of a window of the DiT, frames of the video)."""
    for stride, latents in itertools.product(STRIDES, WINDOW_LATENTS):
        windows = Windows(stride, is_causal, latents * stride + is_causal)
        for t, more in itertools.product(range(2, most_latents + 1), range(most_units + 1)):
            yield windows, t, windows.n_frames(t) + more * unit(windows, t)


def kept_frames(windows, t, n_frames):
    """(what is kept, frames (T,)) for all ways to keep some latents and not all."""
    whole = borders(windows, t, n_frames)
    assert whole[-1] == n_frames
    n = len(whole) - 1
    yield "nothing", np.zeros(n_frames, bool)
    for kept, k in itertools.product(("first", "last", "ends", "every"), (1, 2, 3, 5)):
        if (kept, k) != ("every", 1) and k * (1 + (kept == "ends")) < n:
            yield kept, np.repeat(Given("a.mp4", None, kept, k).latents(n), np.diff(whole))


@pytest.mark.parametrize("is_causal", [False, True])
def test_what_is_given_stays_and_no_latent_is_of_two_drawings(is_causal):
    n = 0
    for windows, t, n_frames in cases(is_causal):
        size = windows.n_frames(t)
        own = np.array(borders(windows, t, size))
        for kept, kept_T in kept_frames(windows, t, n_frames):
            if (is_causal, kept, t) == (True, "last", 2) and windows.latents(windows.frames) > 1:
                continue  # see below
            found = parts(windows, t, kept_T, is_backward=kept == "last")
            drawn_T, shown_T = np.full(n_frames, -1), np.zeros(n_frames, bool)
            for i, part in enumerate(found):
                here = slice(part.start, part.start + size)
                is_told_F = np.repeat(part.known_t, np.diff(own))
                # Whatever it is told is there, and what is given is told.
                np.testing.assert_array_equal(part.known_F, (kept_T | shown_T)[here])
                assert (part.known_F | ~is_told_F).all()
                assert (is_told_F | ~kept_T[here]).all(), (windows, t, n_frames, kept)
                assert part.known_t.any() or i == 0
                drawn_T[here] = np.where(part.new_F, np.where(is_told_F, -2, i), drawn_T[here])
                shown_T[here] = True
                # What it draws of a latent is shown of all of the latent.
                assert (part.new_F | is_told_F).all()
            assert shown_T.all()
            # No frame that is given is from the noise.
            assert (drawn_T[kept_T] < 0).all()
            n += 1
    assert n > 1000


def test_windows_of_a_causal_tokenizer_meet_at_its_latents():
    windows = Windows(4, True, 17)
    kept_T = np.zeros(33, bool)
    kept_T[13:] = True  # the last five latents
    found = parts(windows, 5, kept_T, is_backward=True)
    assert [part.start for part in found] == [16, 8, 0]
    assert [part.known_t.tolist() for part in found] == [
        [True] * 5,
        [False, False, True, True, True],  # frames 13 to 16 are given
        [False, False, False, True, True],
    ]
    # The latent of frames 5 to 8 of the last window holds frame 8, which the one before has shown
    # as a first frame by itself.
    assert found[1].new_F.nonzero()[0].tolist() == [*range(8)]
    assert found[2].new_F.nonzero()[0].tolist() == [*range(9)]


def test_a_window_of_two_causal_latents_has_nothing_to_go_back_from():
    windows = Windows(4, True, 5)
    kept_T = np.arange(9) > 4
    assert len(parts(windows, 2, kept_T, is_backward=False)) == 2
    with pytest.raises(ValueError, match="frames=9: expected 5, those of the model's 2 latents"):
        parts(windows, 2, kept_T, is_backward=True)


def test_a_tokenizer_that_begins_anew_is_followed_in_whole_windows():
    windows = Windows(4, True, 9)
    assert unit(windows, 3) == 4
    assert unit(windows, 5) == 9
    assert unit(Windows(4, False, 8), 5) == 4
    assert borders(windows, 5, 14 + 9) == [0, 1, 5, 9, 10, 14, 18, 19, 23]
    found = parts(windows, 5, np.zeros(14 + 9, bool), is_backward=False)
    assert [part.start for part in found] == [0, 9]
