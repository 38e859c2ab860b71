"""Files that are not what they seem: damaged, truncated, playlists, and no videos at all."""

import wave

import av
import numpy as np
import pytest
from videos import gradient_video, write_encoded, write_lossless

from opensora_jax.data.video_io import VideoError, probe, read_video, write_video


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("part", [0, 0.05, 0.5, 0.9])
def test_truncated_file(tmp_path, suffix, part):
    path = tmp_path / f"cut{suffix}"
    write_video(path, gradient_video(), fps=8)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    for read in (probe, read_video):
        with pytest.raises(VideoError, match=rf"cut\{suffix}: \w+"):
            read(path)


def test_truncated_behind_a_leading_index(tmp_path):
    """With the index in front the file opens; its missing end must still be noticed."""
    path = tmp_path / "cut.mp4"
    write_encoded(path, gradient_video(), movflags="+faststart")
    assert len(read_video(path)) == 8
    path.write_bytes(path.read_bytes()[:-100])
    for read in (probe, read_video):
        with pytest.raises(VideoError, match=r"cut\.mp4: truncated"):
            read(path)


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx"), ("a.mkv", "libx264")])
def test_an_end_that_is_missing_without_an_index_is_told_by_the_stated_length(
    tmp_path, name, codec
):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), np.uint8)
    write_encoded(path, noise, codec)
    assert len(read_video(path)) == probe(path).n_frames == 16
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for read in (probe, read_video):
        with pytest.raises(
            VideoError, match=r"a\.\w+: truncated: (0\.\d|1\.0) s of a stated 2\.0 s"
        ):
            read(path)


def test_whole_files_are_not_called_truncated(tmp_path):
    path = tmp_path / "unstated.webm"
    write_encoded(path, gradient_video(16), "libvpx", live="1")
    with av.open(str(path)) as container:
        assert container.duration is None
    assert len(read_video(path)) == 16
    path = tmp_path / "sound.mkv"
    write_encoded(path, gradient_video(16), seconds_of_sound=8)
    assert len(read_video(path)) == 16
    # Frames that are far from each other: the last one lasts as long as the file says.
    path = tmp_path / "slow.mkv"
    write_lossless(path, gradient_video(4), pts=[0, 10_000, 20_000, 30_000])
    assert len(read_video(path)) == 4


def test_playlists_are_refused(tmp_path):
    """libav opens the files that they name: any that this user can read."""
    write_encoded(tmp_path / "a.ts", gradient_video())
    concat = "ffconcat version 1.0\n" + "file a.ts\n" * 2
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n"
    playlists = {"a.ffconcat": concat, "concat.mp4": concat, "concat.MKV": concat, "a.m3u8": hls}
    for name, text in playlists.items():
        path = tmp_path / name
        path.write_text(text)
        with av.open(str(path)) as container:
            assert len(list(container.decode(video=0))) >= 8
        for read in (probe, read_video):
            with pytest.raises(VideoError, match=rf"{name}: (suffix|not a video)"):
                read(path)


def test_a_name_that_looks_like_an_address_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("a.mp4", gradient_video(3), fps=8)
    (tmp_path / "whole.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    write_video("whole.mp4", gradient_video(5), fps=8)
    (tmp_path / "whole.mp4").rename("concat:a.mp4")
    assert len(read_video("concat:a.mp4")) == 5


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "x/" * 3000 + "a.mp4", "x" * 10**6])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(VideoError, match="File name too long") as caught:
        read_video(tmp_path / name)
    assert len(str(caught.value)) < 200


def test_damage_is_found_and_only_where_it_is_read(tmp_path):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8)
    write_video(path, noise, fps=8)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(range(200)) * 100
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"a\.mp4"):
        read_video(path)
    assert len(read_video(path, n_frames=2)) == 2


def test_random_damage_is_read_or_named(tmp_path):
    """Whatever bytes are wrong: frames or a VideoError, never another error."""
    rng = np.random.default_rng(0)
    write_video(tmp_path / "whole.mp4", gradient_video(), fps=8)
    write_video(tmp_path / "whole.gif", gradient_video(), fps=8)
    write_lossless(tmp_path / "whole.mkv", gradient_video())
    reasons = []
    for i in range(300):
        suffix = (".mp4", ".gif", ".mkv")[i % 3]
        data = bytearray((tmp_path / f"whole{suffix}").read_bytes())
        ends = np.r_[: min(1000, len(data)), max(0, len(data) - 1000) : len(data)]  # the headers
        for position in rng.choice(ends, rng.integers(1, 10)):
            data[position] = rng.integers(256)
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(data)
        try:
            probe(path)
            assert read_video(path, resolution=32, fps=4, max_frames=20).shape[1:] == (32, 32, 3)
        except VideoError as error:
            reasons.append(str(error))
    assert 50 < len(reasons) < 300
    assert all(str(tmp_path / "damaged") in reason for reason in reasons)


def test_a_title_in_an_unknown_encoding(tmp_path):
    write_video(tmp_path / "plain.mp4", gradient_video(), fps=8)
    with (
        av.open(str(tmp_path / "plain.mp4")) as plain,
        av.open(str(tmp_path / "a.mp4"), "w") as container,
    ):
        container.metadata["title"] = "title-title-title"
        stream = container.add_stream_from_template(plain.streams.video[0])
        for packet in plain.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"title-title" in data
    (tmp_path / "a.mp4").write_bytes(data.replace(b"title-title", b"\xfftle-\xfe\xe9tle"))
    assert len(read_video(tmp_path / "a.mp4")) == probe(tmp_path / "a.mp4").n_frames == 8


def test_not_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("a caption, not a video\n" * 100)
    (tmp_path / "text.txt").write_text("libav would play this as terminal art\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with av.open(str(tmp_path / "picture.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
        frame = av.VideoFrame.from_ndarray(gradient_video()[0], format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "picture.mp4").write_bytes((tmp_path / "picture.png").read_bytes())
    write_video(tmp_path / "a.mp4", gradient_video(), fps=8)
    (tmp_path / "a.mp4").rename(tmp_path / "video.dat")
    for name in (
        "text.mp4",
        "text.txt",
        "folder.mp4",
        "sound.wav",
        "picture.mp4",
        "video.dat",
        "missing.mp4",
    ):
        for read in (probe, read_video):
            with pytest.raises(VideoError, match=name.replace(".", r"\.") + r": \w+"):
                read(tmp_path / name)
