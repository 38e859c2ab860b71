"""download_msrvtt.sh against a real HTTP server on this machine, by curl and by wget."""

import contextlib
import http.server
import io
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "data_prep" / "download_msrvtt.sh"


def make_zip(top="MSRVTT/"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{top}annotation/MSR_VTT.json", "{}")
        archive.writestr(f"{top}videos/all/video0.mp4", os.urandom(20_000))
    return buffer.getvalue()


@contextlib.contextmanager
def serve(content, ranges):
    """Serves `content` at /MSRVTT.zip, with ranges; notes where each answer begins in `ranges`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/MSRVTT.zip":
                self.send_error(404)
                return
            start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
            ranges.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", span)
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/MSRVTT.zip"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def download(tmp_path, url, without=None):
    """Runs the script into tmp_path/data with a PATH that lacks one program."""
    programs = tmp_path / f"without-{without}"
    programs.mkdir(exist_ok=True)
    for name in {"curl", "wget", "unzip", "mkdir", "mv", "rm", "wc", "bash"} - {without}:
        if (found := shutil.which(name)) and not (programs / name).exists():
            (programs / name).symlink_to(found)
    return subprocess.run(
        [shutil.which("bash"), SCRIPT, tmp_path / "data", url],
        capture_output=True,
        text=True,
        env={"PATH": str(programs), "no_proxy": "127.0.0.1"},
        check=False,
    )


@pytest.mark.parametrize("without", ["curl", "wget"])
@pytest.mark.parametrize("top", ["MSRVTT/", ""])
def test_downloads_and_unpacks(tmp_path, without, top):
    with serve(make_zip(top), []) as url:
        done = download(tmp_path, url, without)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "MSRVTT" / "annotation" / "MSR_VTT.json").read_text() == "{}"
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"MSRVTT", "MSRVTT.zip"}
    again = download(tmp_path, "http://127.0.0.1:9/gone.zip", without)
    assert again.returncode == 0
    assert "there already" in again.stdout


@pytest.mark.parametrize("without", ["curl", "wget"])
def test_an_interrupted_download_goes_on(tmp_path, without):
    content, ranges = make_zip(), []
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "MSRVTT.zip.part").write_bytes(content[:7000])
    with serve(content, ranges) as url:
        done = download(tmp_path, url, without)
    assert done.returncode == 0, done.stderr
    assert ranges == [7000]
    assert (tmp_path / "data" / "MSRVTT.zip").read_bytes() == content


@pytest.mark.parametrize("without", ["curl", "wget"])
def test_an_address_that_does_not_answer_is_an_error(tmp_path, without):
    with serve(make_zip(), []) as url:
        wrong = url.replace("MSRVTT.zip", "other.zip")
        done = download(tmp_path, wrong, without)
    assert done.returncode == 1
    assert f"error: {wrong} could not be downloaded" in done.stderr
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    "content", [b"<html>moved</html>", make_zip()[:9000]], ids=["a web page", "half an archive"]
)
def test_what_is_not_a_whole_archive_is_not_unpacked(tmp_path, content):
    with serve(content, []) as url:
        done = download(tmp_path, url)
    assert done.returncode == 1
    assert f"what came ({len(content)} bytes) is not a whole zip archive" in done.stderr
    assert not list((tmp_path / "data").iterdir())


def test_without_arguments_it_says_how_to_use_it():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DIR [URL]" in done.stderr
