"""Images are videos of one frame, and stills among the clips that a tokenizer is trained on."""

import imageio.v3 as iio
import numpy as np
import pytest
from videos import decoded_whole, gradient_video, mean_error, write_lossless

from opensora_jax.data import pipeline
from opensora_jax.data.clips import Clip, Decoding, Filtered
from opensora_jax.data.video_io import VideoError, probe, read_video
from opensora_jax.windows import Windows

IMAGE = gradient_video(1)[0]  # (48, 64, 3)


@pytest.mark.parametrize(
    ("name", "image", "most"),
    [
        ("a.png", IMAGE, 1),
        ("a.PNG", np.dstack([IMAGE, np.full((48, 64), 255, np.uint8)]), 1),  # opaque
        ("gray.png", IMAGE[..., 0], 1),
        ("deep.png", IMAGE[..., 0].astype(np.uint16) * 257, 1),
        ("a.jpg", IMAGE, 4),
        ("a.webp", IMAGE, 6),
        ("name with % and 'quotes' %03d.jpg", IMAGE, 4),
    ],
)
def test_an_image_is_a_video_of_one_frame(tmp_path, name, image, most):
    iio.imwrite(tmp_path / name, image)
    info = probe(tmp_path / name)
    assert (info.n_frames, info.height, info.width) == (1, 48, 64)
    found = read_video(tmp_path / name)
    assert found.shape == (1, 48, 64, 3)
    expected = image if image.ndim == 3 else np.repeat(IMAGE[..., :1], 3, axis=2)
    assert mean_error(found[0], expected[..., :3]) < most


def test_what_is_in_the_file_counts_and_not_its_suffix(tmp_path):
    iio.imwrite(tmp_path / "a.png", IMAGE)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert mean_error(read_video(tmp_path / "a.jpg")[0], IMAGE) < 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_cut_image_is_told(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    iio.imwrite(path, noise)
    whole = path.read_bytes()
    for n in (0, 3, 20, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:n])
        with pytest.raises(VideoError, match=r"truncated|not an image|cannot be read|empty"):
            read_video(path)
    path.write_text("no image")
    with pytest.raises(VideoError, match="not an image"):
        probe(path)


def test_images_go_into_a_dataset_of_one_frame_or_are_counted_as_too_short(tmp_path):
    iio.imwrite(tmp_path / "a.png", IMAGE)
    sizes = {"resolution": (16, 24), "fps": None, "max_frames": None, "n_frames": None}
    ((clip, frames),) = decoded_whole(
        Decoding(**sizes, windows=Windows(4, True, 1)), tmp_path, [{"file": "a.png"}]
    )
    assert isinstance(clip, Clip)
    assert frames.shape == (1, 16, 24, 3)
    ((clip, _),) = decoded_whole(
        Decoding(**sizes, windows=Windows(4, False, 4)), tmp_path, [{"file": "a.png"}]
    )
    assert clip == Filtered("a.png", "1 frames, expected at least 4")


@pytest.fixture
def sources(tmp_path):
    for i in range(4):
        moving = gradient_video(8) + np.arange(8, dtype=np.uint8)[:, None, None, None] * 20
        write_lossless(tmp_path / f"{i}.mkv", moving)
        iio.imwrite(tmp_path / f"{i}.png", IMAGE + np.uint8(10 * i))
    (tmp_path / "bad.png").write_text("no image")
    assert len(pipeline.find_videos(tmp_path)) == 4  # an image beside a video is none
    videos = pipeline.ClipSource(pipeline.find_videos(tmp_path), 4, 16)
    return videos, pipeline.StillSource(pipeline.find_images(tmp_path), 4, 16)


def draw(sources, n, share, state=None, **options):
    videos, stills = sources
    batches = pipeline.clips(
        videos, stills=stills, still_share=share, batch_size=8, seed=0, **options
    )
    if state is not None:
        batches.set_state(state)
    found = [next(batches)["video"] for _ in range(n)]
    return found, batches.get_state()


def test_a_share_of_the_clips_are_stills_the_same_ones_again(sources):
    batches, _ = draw(sources, 20, 0.25)
    clips = np.concatenate(batches)
    is_still = np.array([(clip == clip[:1]).all() for clip in clips])
    assert 0.15 < is_still.mean() < 0.35
    # Each image is among them, the one that cannot be read is not.
    assert len({clip[0].tobytes() for clip in clips[is_still]}) == 4
    first, state = draw(sources, 5, 0.25)
    again, _ = draw(sources, 5, 0.25, state=state)
    np.testing.assert_array_equal(np.stack(first + again), np.stack(batches[:10]))
    half, _ = draw(sources, 5, 0.25, indices=[1, 3])
    np.testing.assert_array_equal(np.stack(half), np.stack(first)[:, [1, 3]])


def test_without_images_the_clips_are_what_they_were(sources):
    videos, _ = sources
    plain = pipeline.clips(videos, batch_size=8, seed=0)
    without, _ = draw(sources, 3, 0.0)
    np.testing.assert_array_equal(
        np.stack([next(plain)["video"] for _ in range(3)]).shape, np.stack(without).shape
    )
    other, _ = draw((videos, None), 3, 0.5)
    plain = pipeline.clips(videos, batch_size=8, seed=0)
    np.testing.assert_array_equal(np.stack([next(plain)["video"] for _ in range(3)]), other)
