"""Windows of videos against the same frames of the whole, of files of several kinds."""

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from opensora_jax.data import video_io
from opensora_jax.data.video_window import Timeline

N_FRAMES, RATE = 90, 24


def write(path, codec, **options):
    """A video with groups of 30 frames, some of which refer to later ones."""
    rng = np.random.default_rng(0)
    start = rng.integers(60, 190, (1, 6, 8, 3))
    end = rng.integers(60, 190, (1, 6, 8, 3))
    t = np.linspace(0, 1, N_FRAMES)[:, None, None, None]
    frames = np.round(start + t * (end - start)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


FILES = {
    "b_frames.mp4": ("libx264", {"g": "30", "bf": "3", "b-pyramid": "normal"}),
    "open_groups.mp4": ("libx264", {"g": "30", "bf": "2", "x264-params": "open-gop=1"}),
    "one_group.mkv": ("libx264", {"g": "250"}),
    "two.webm": ("libvpx-vp9", {"g": "30", "cpu-used": "8", "deadline": "realtime"}),
    "transport.ts": ("libx264", {"g": "30", "bf": "2"}),
    "old.avi": ("mpeg4", {"g": "30", "bf": "2"}),
}


def damage(path, numbers):
    """Empties the packets of these frames."""
    with av.open(str(path)) as container:
        packets = sorted((p.pts, p.pos, p.size) for p in container.demux(video=0) if p.size)
    data = bytearray(path.read_bytes())
    for i in numbers:
        _, start, size = packets[i]
        data[start + 5 : start + size] = bytes(size - 5)
    path.write_bytes(data)


@pytest.mark.parametrize("fps", [None, 8.0, 30.0])
@pytest.mark.parametrize("name", FILES)
def test_a_window_has_the_frames_of_the_whole(tmp_path, name, fps):
    codec, options = FILES[name]
    path = write(tmp_path / name, codec, **options)
    whole = video_io.read_video(path, resolution=16, fps=fps)
    timeline = Timeline.read(path, fps)
    assert len(timeline) == len(whole)
    for start in (0, 1, len(whole) // 2 + 1, len(whole) - 6):
        found = timeline.window(start, 6, 16)
        np.testing.assert_array_equal(found, whole[start : start + 6])


def test_little_more_than_the_window_is_decoded(tmp_path, monkeypatch):
    codec, options = FILES["b_frames.mp4"]
    timeline = Timeline.read(write(tmp_path / "a.mp4", codec, **options))
    decoded = []
    decode = video_io.to_image
    monkeypatch.setattr(video_io, "to_image", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr(video_io, "read_video", None)  # no way back to the whole
    timeline.window(70, 6, 16)
    assert len(decoded) == 6


def test_damage_outside_the_window_does_no_harm_and_within_is_told(tmp_path):
    codec, options = FILES["b_frames.mp4"]
    path = write(tmp_path / "a.mp4", codec, **options)
    whole = video_io.read_video(path, resolution=16)
    timeline = Timeline.read(path)
    damage(path, range(60, 70))
    np.testing.assert_array_equal(timeline.window(10, 6, 16), whole[10:16])
    with pytest.raises(video_io.VideoError, match=r"a\.mp4"):
        timeline.window(62, 6, 16)


def test_groups_that_the_decoder_does_not_know_to_begin(tmp_path):
    """Key frames that are no IDR frames and carry no recovery point."""
    codec, options = FILES["open_groups.mp4"]
    source, path = write(tmp_path / "a.mp4", codec, **options), tmp_path / "b.mp4"
    with av.open(str(source)) as before, av.open(str(path), "w") as after:
        stream = after.add_stream_from_template(before.streams.video[0])
        no_messages = BitStreamFilterContext("filter_units=remove_types=6", before.streams.video[0])
        for packet in before.demux(video=0):
            for filtered in no_messages.filter(packet if packet.size else None):
                filtered.stream = stream
                after.mux(filtered)
    whole = video_io.read_video(path, resolution=16)
    timeline = Timeline.read(path)
    assert len(timeline) == len(whole) == N_FRAMES
    for start in (0, 35, 62, 84):
        np.testing.assert_array_equal(timeline.window(start, 6, 16), whole[start : start + 6])
