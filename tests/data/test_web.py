"""Captions and videos at addresses of a real web server."""

import json
import pickle
import socket

import pytest
import web_server
from etils import epath
from videos import decoded_whole, gradient_video

from opensora_jax import files, web
from opensora_jax.data.captions import CaptionsError, expect_a_video, read_captions
from opensora_jax.data.clips import Clip, Decoding, Failed, decode_clips
from opensora_jax.data.video_io import write_video
from opensora_jax.windows import Windows

DECODING = Decoding((16, 24), None, None, None, Windows(4, False, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "sub").mkdir()
    for name in ("a.mp4", "sub/with space, 50%.mp4", "ünï?#.mp4", "text.mp4"):
        write_video(folder / "b.mp4", gradient_video(8), fps=8)
        (folder / "b.mp4").rename(folder / name)
    (folder / "text.mp4").write_text("<html>")
    entries = [{"file": "a.mp4", "captions": ["a cat"]}]
    (folder / "captions.json").write_text(json.dumps(entries))
    (folder / "captions.csv").write_text("file,captions\na.mp4,a cat\n")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with web_server.serve(folder) as address:
        yield address


def test_an_address_is_a_path(address):
    path = epath.Path("https://host.org/data") / "a.mp4"
    assert isinstance(path, web.WebPath)
    assert str(path) == "https://host.org/data/a.mp4"
    assert str(pickle.loads(pickle.dumps(path))) == str(path)
    assert files.is_remote(path)
    assert (path.name, path.suffix, str(path.parent)) == ("a.mp4", ".mp4", "https://host.org/data")
    assert files.absolute(path) == path
    here = epath.Path(address)
    assert [(here / name).exists() for name in ("a.mp4", "nothing.mp4")] == [True, False]
    with pytest.raises(OSError, match="cannot be written"):
        path.write_text("x")


@pytest.mark.parametrize("name", ["captions.json", "captions.csv"])
def test_captions_at_an_address(address, name):
    found = read_captions(f"{address}/{name}")
    assert list(found) == [{"file": "a.mp4", "captions": ["a cat"]}]
    expect_a_video(found, address)
    with pytest.raises(CaptionsError, match=r"none of the captions' videos is there, not 'a\.mp4'"):
        expect_a_video(found, f"{address}/sub")


def test_captions_that_are_not_there(address):
    with pytest.raises(CaptionsError, match=r"nowhere\.json: no such file"):
        read_captions(f"{address}/nowhere.json")
    with pytest.raises(CaptionsError, match=r"500\.json: the server says 500"):
        read_captions(f"{address}/500.json")


def test_each_video_at_an_address_is_a_clip_or_has_failed_with_its_reason(address):
    expected = {
        "a.mp4": None,
        "sub/with space, 50%.mp4": None,
        "ünï?#.mp4": None,
        "nothing.mp4": "no such file",
        "403.mp4": "the server says 403 Forbidden",
        "500.mp4": "the server says 500 Internal Server Error",
        "cut.mp4": "the server does not answer: ClientPayloadError",
        "text.mp4": "cannot be read as a video: Invalid data found when processing input",
    }
    entries = [{"file": name} for name in expected]
    found = [clip for clip, _ in decoded_whole(DECODING, address, entries)]
    for clip, (name, reason) in zip(found, expected.items(), strict=True):
        assert isinstance(clip, Clip) if reason is None else clip == Failed(name, reason), name


def test_a_server_that_is_not_there_ends_it(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    message = r"^http://127[.\w:/]* 127\.0\.0\.1 cannot be reached"
    entries = [{"file": "a.mp4", "captions": ["a"]}]
    with pytest.raises(OSError, match=message):
        list(decode_clips(DECODING, address, entries))
    with pytest.raises(OSError, match=message):
        expect_a_video(entries, address)
    with pytest.raises(CaptionsError, match="cannot be reached"):
        read_captions(f"{address}/captions.json")
