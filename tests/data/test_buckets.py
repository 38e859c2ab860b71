"""Which bucket a clip goes to, and buckets that suit clips: properties over many drawn sizes."""

from fractions import Fraction

import numpy as np
import pytest

from opensora_jax.data.buckets import Size, choose, fits, loss, nearest, parse, suitable
from opensora_jax.windows import Windows

BUCKETS = parse("16x128x128,16x96x160,8x128x128,1x128x128")
VIDEOGPT, CAUSAL = Windows(4, False, 16), Windows(4, True, 17)


def draw(rng, n_frames=(2, 100), side=(16, 2000)):
    return Size(int(rng.integers(*n_frames)), *map(int, rng.integers(*side, 2)))


def drawn(n=300):
    rng = np.random.default_rng(0)
    return [draw(rng) if i % 5 else draw(rng, (1, 2)) for i in range(n)]


def test_sizes_are_read_and_written():
    assert BUCKETS[1] == Size(16, 96, 160)
    assert ",".join(map(str, BUCKETS)) == "16x128x128,16x96x160,8x128x128,1x128x128"
    assert parse(" 8x64x64 , 1x64x64") == (Size(8, 64, 64), Size(1, 64, 64))
    for text in ("", "16x128", "16x128x128,", "16x0x128", "ax1x1", "16x128x-1"):
        with pytest.raises(ValueError, match="expected sizes of frames x height x width"):
            parse(text)
    with pytest.raises(ValueError, match="expected 8x64x64 once"):
        parse("8x64x64,1x64x64,8x64x64")


@pytest.mark.parametrize(
    ("clip", "bucket", "expected"),
    [
        ((16, 96, 160), (16, 96, 160), 0),
        ((16, 960, 1600), (16, 96, 160), 0),  # made smaller: not counted
        ((16, 100, 200), (16, 50, 50), Fraction(1, 2)),  # half of the pixels
        ((20, 64, 64), (15, 64, 64), Fraction(1, 4)),
        ((8, 32, 32), (8, 64, 64), Fraction(3, 4)),  # three of four pixels are made up
        ((20, 32, 64), (15, 64, 64), Fraction(3, 4) + Fraction(1, 2) + Fraction(1, 4)),
    ],
)
def test_what_is_lost(clip, bucket, expected):
    assert loss(Size(*clip), Size(*bucket)) == expected


def test_properties_of_the_loss():
    rng = np.random.default_rng(1)
    for clip in drawn():
        bucket = draw(rng, (1, clip.n_frames + 1))
        found = loss(clip, bucket)
        assert 0 <= found < 3
        assert loss(clip, clip) == 0
        # The same lying on its side.
        turned = [Size(s.n_frames, s.width, s.height) for s in (clip, bucket)]
        assert loss(*turned) == found
        # Longer clips lose more, and so do smaller ones, and never by being larger.
        assert loss(Size(clip.n_frames + 1, clip.height, clip.width), bucket) > found
        twice = Size(clip.n_frames, 2 * clip.height, 2 * clip.width)
        assert loss(twice, bucket) <= found
        # Nothing is lost but where the ratio, the length or the size differ.
        same = clip.height * bucket.width == clip.width * bucket.height
        large = clip.height >= bucket.height and clip.width >= bucket.width
        assert (found == 0) == (same and large and clip.n_frames == bucket.n_frames)


def test_a_clip_goes_where_it_loses_least():
    for clip in drawn():
        chosen = choose(clip, BUCKETS)
        usable = [bucket for bucket in BUCKETS if fits(clip, bucket)]
        assert (chosen is None) == (not usable)
        assert all(loss(clip, chosen) <= loss(clip, bucket) for bucket in usable)
        assert chosen == choose(clip, BUCKETS[::-1])
        assert nearest(clip, BUCKETS) == (chosen or Size(8, 128, 128))
    assert choose(Size(40, 720, 1280), BUCKETS) == Size(16, 96, 160)
    assert choose(Size(9, 720, 1280), BUCKETS) == Size(8, 128, 128)
    assert choose(Size(7, 128, 128), BUCKETS) is None
    # Of equal losses the largest.
    assert choose(Size(8, 512, 512), parse("8x64x64,8x128x128,8x32x32")) == Size(8, 128, 128)


def test_images_and_videos_do_not_mix():
    assert choose(Size(1, 100, 400), BUCKETS) == Size(1, 128, 128)
    assert choose(Size(1, 128, 128), BUCKETS[:3]) is None
    assert nearest(Size(1, 128, 128), BUCKETS[:3]) == Size(8, 128, 128)
    assert choose(Size(9, 64, 64), BUCKETS[3:]) is None
    assert nearest(Size(9, 64, 64), BUCKETS[3:]) == Size(1, 128, 128)


@pytest.mark.parametrize("windows", [VIDEOGPT, CAUSAL])
def test_suitable_sizes_are_few_fit_and_keep_to_the_budget(windows):
    rng = np.random.default_rng(2)
    shapes = [(720, 1280), (1280, 720), (480, 640), (512, 512), (1080, 1080)]
    clips = [
        Size(int(rng.integers(1, 60)) if i % 4 else 1, *shapes[rng.integers(5)]) for i in range(400)
    ]
    sizes = suitable(clips, windows, (16, 16), 320)
    assert 3 <= len(sizes) <= 8
    assert sizes == suitable(clips[::-1], windows, (16, 16), 320)  # in any order
    assert [size.is_image for size in sizes] == sorted(size.is_image for size in sizes)
    assert sizes[-1].is_image
    longest = max(size.n_frames for size in sizes)
    assert longest == windows.frames
    budget = 320 // windows.latents(longest)
    for size in sizes:
        assert size.is_image or windows.fit(size.n_frames) == size.n_frames
        assert not size.height % 16
        assert not size.width % 16
        assert 0.6 * budget <= size.height * size.width // 256 <= budget
    # Every clip of a sixth of a window or more has its place, where most keep 3 in 4 pixels.
    chosen = [choose(clip, sizes) for clip in clips if clip.is_image or clip.n_frames > 8]
    assert None not in chosen
    assert {size.height < size.width for size in chosen} == {True, False}


def test_suitable_sizes_of_small_and_of_bad_clips():
    # No larger than the clips, and as many as there are kinds of them.
    clips = [Size(16, 64, 64)] * 9 + [Size(16, 32, 128)] * 9
    found = suitable(clips, VIDEOGPT, (16, 16), 10_000)
    assert found == (Size(16, 64, 64), Size(16, 32, 80))
    assert suitable([Size(1, 64, 64)], VIDEOGPT, (16, 16), 16) == (Size(1, 64, 64),)
    # Those that are too short do not hide the others.
    some = suitable([Size(2, 64, 64)] * 9 + [Size(40, 64, 64)], VIDEOGPT, (16, 16), 160)
    assert some[0].n_frames == 32
    some = suitable([Size(2, 64, 64)] * 9 + [Size(40, 64, 64)], VIDEOGPT, (16, 16), 160, 20)
    assert some[0].n_frames == 16
    with pytest.raises(ValueError, match="expected a clip of 4 frames or more"):
        suitable([Size(3, 64, 64)], VIDEOGPT, (16, 16), 100)
    with pytest.raises(ValueError, match="bucket_tokens=3: expected at least 4, the latent frames"):
        suitable([Size(16, 64, 64)], VIDEOGPT, (16, 16), 3)
