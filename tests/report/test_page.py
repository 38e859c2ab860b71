"""The report of a small workdir with real videos and metrics, read back by an HTML parser."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from ml_collections import ConfigDict

from opensora_jax.data import moving_shapes, video_io
from opensora_jax.report import sections
from opensora_jax.stages import report
from opensora_jax.train.metrics_log import MetricsWriter

CONFIG = ConfigDict({"seed": 7, "sample": {"prompts": ("<b>bold</b>",)}})
PROMPTS = ("a red circle moves up", "<script>alert('x')</script> & \"quoted\"")
N_CODES = 16
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags with attributes, text by the tag around it; complains of tags that do not match."""

    def __init__(self, folder):
        super().__init__()
        self.source = (folder / "report.html").read_text("utf-8")
        self.tags, self.texts, self._open = [], [], []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert tag == self._open.pop()

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data.strip()))

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def inside(self, tag):
        return [text for name, text in self.texts if name == tag and text]

    @property
    def videos(self):
        prefix = "data:video/mp4;base64,"
        sources = [video["src"] for video in self.attributes("video")]
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix), validate=True) for source in sources]


def write_samples(workdir, step, prompts=PROMPTS):
    folder = workdir / "dit" / "samples" / f"step{step:06d}"
    folder.mkdir(parents=True)
    for i in range(len(prompts)):
        video = moving_shapes.render(np.random.default_rng(step + i), "red", "circle", "up", 4, 32)
        video_io.write_video(folder / f"{i:02d}.mp4", video, fps=8)
    entries = [{"file": f"{i:02d}.mp4", "prompt": prompt} for i, prompt in enumerate(prompts)]
    (folder / "prompts.json").write_text(json.dumps(entries))
    return [(folder / entry["file"]).read_bytes() for entry in entries]


def write_dit_metrics(workdir):
    writer = MetricsWriter(workdir / "dit", 0)
    for step in range(10, 60, 10):
        writer.write(step, {"loss": 1 / step, "grad_norm": 2.0, "learning_rate": 1e-3})
    writer.write(50, {"validation_loss": 0.5, "validation_loss/t=0.1": 0.4})


def write_vqvae(workdir):
    samples = workdir / "vqvae" / "samples"
    samples.mkdir(parents=True)
    for step in (999_999, 1_000_000):
        video = moving_shapes.render(np.random.default_rng(step), "blue", "square", "up", 4, 32)
        video_io.write_video(samples / f"step{step:06d}.mp4", video, fps=8)
    shares = {f"detected_{name}": 0.75 for name in ("all", "color", "shape", "direction")}
    counts = [0, 0, 0, *range(1, N_CODES - 2)]
    figures = {
        "step": 1_000_000,
        "psnr": 27.53,
        "ssim": 0.9,
        "perplexity": 9.0,
        "code_counts": counts,
    }
    (workdir / "vqvae" / "reconstruction.json").write_text(json.dumps(figures | shares))
    writer = MetricsWriter(workdir / "vqvae", 0)
    writer.write(50, {"loss": 1.0, "perplexity": float("nan"), "tokens_per_second": 9e4})
    writer.write(100, {"loss": 0.01, "perplexity": 8.0, "tokens_per_second": 9e4})
    writer.write(100, {"held_out/psnr": 27.5, "held_out/perplexity": 9.0})
    return (samples / "step1000000.mp4").read_bytes()


def write_rest(workdir):
    shares = {"all": 0.5, "color": 1.0, "shape": 0.625, "direction": 0.875}
    fidelity = {"seen": shares, "held_out": shares | {"all": 0.25}, "seconds": {"dit": 3725.0}}
    (workdir / "fidelity.json").write_text(json.dumps(fidelity))
    metadata = {
        "n_rows": 1234,
        "resolution": [32, 32],
        "counts": {"kept": 411, "filtered": 0, "failed": 1},
        "filtered": [],
        "failed": [{"file": "<i>.mp4", "reason": "truncated & damaged"}],
    }
    (workdir / "dataset").mkdir()
    (workdir / "dataset" / "metadata.json").write_text(json.dumps(metadata))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(page of a workdir with everything in it, the bytes of the videos it should show)."""
    workdir = tmp_path_factory.mktemp("whole")
    earlier, latest = write_samples(workdir, 20), write_samples(workdir, 50)
    reconstruction = write_vqvae(workdir)
    write_dit_metrics(workdir)
    write_rest(workdir)
    report.run(CONFIG, workdir)
    assert not list(workdir.glob("*.tmp"))
    return Page(workdir), [latest[0], earlier[0], latest[1], earlier[1], reconstruction]


def test_videos_are_the_files_and_loop(whole):
    page, expected = whole
    assert page.videos == expected
    for video in page.attributes("video"):
        assert {"autoplay", "loop", "muted", "playsinline"} <= video.keys()


def test_nothing_is_loaded_and_nothing_runs(whole):
    page, _ = whole
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:video/mp4;"))
        assert not [name for name in attributes if name.startswith("on")]


def test_text_is_escaped(whole):
    page, _ = whole
    assert [text for text in page.inside("p") if text in PROMPTS] == list(PROMPTS)
    assert "<i>.mp4" in page.inside("td")
    assert "truncated & damaged" in page.inside("td")
    assert json.loads("".join(page.inside("pre"))) == json.loads(CONFIG.to_json())


def test_sections_and_figures(whole):
    page, _ = whole
    assert page.inside("h2") == [
        "Samples",
        "Does a sample show what its caption says?",
        "DiT training",
        "What the VQ-VAE keeps of a video",
        "Codebook use",
        "VQ-VAE training",
        "Dataset",
        "How it was made",
    ]
    tiles = page.inside("b")
    for value in ("50%", "25%", "27.5 dB", "1 h 02 min", str(N_CODES - 3), "1,234", "411"):
        assert value in tiles
    cells = page.inside("td")
    assert cells[:4] == ["50%", "100%", "62%", "88%"]
    assert cells[8:16] == ["75%"] * 4 + ["2%", "25%", "33%", "25%"]  # the ceiling, and guessing


def test_curves(whole):
    page, _ = whole
    charts = page.inside("h3")
    assert charts == [
        *("Training loss", "Validation loss by noise level", "Gradient norm", "Learning rate"),
        *("Training loss", "Reconstructions: PSNR (dB)", "Codebook perplexity"),
        "Tokens per second",
    ]
    assert len(page.attributes("svg")) == len(charts) + 1  # and the codebook's
    labels = page.inside("text")
    for label in ("t=0.1", "mean", "training batches", "held-out videos"):
        assert labels.count(label) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "currentColor" in page.source


def test_a_run_of_the_dit_only(tmp_path):
    latest = write_samples(tmp_path, 50)
    write_dit_metrics(tmp_path)
    report.run(CONFIG, tmp_path)
    page = Page(tmp_path)
    assert page.inside("h2") == ["Samples", "DiT training", "How it was made"]
    assert page.videos == latest
    assert not page.inside("b")


def test_an_empty_workdir(tmp_path):
    report.run(CONFIG, tmp_path)
    page = Page(tmp_path)
    assert page.inside("h2") == ["How it was made"]
    assert page.inside("h1") == [f"Text to video: {tmp_path.name}"]


def test_the_command_is_shown(tmp_path, monkeypatch):
    arguments = ["-m", "opensora_jax.main", "--config=configs/<mine>.py", "--workdir=a b"]
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", *arguments])
    report.run(CONFIG, tmp_path)
    expected = "python -m opensora_jax.main '--config=configs/<mine>.py' '--workdir=a b'"
    assert Page(tmp_path).inside("code") == [expected]


def test_written_anew_with_later_samples(tmp_path):
    first = write_samples(tmp_path, 999_999)
    report.run(CONFIG, tmp_path)
    assert Page(tmp_path).videos == first
    later = write_samples(tmp_path, 1_000_000, prompts=PROMPTS[:1])
    (tmp_path / "dit" / "samples" / "step1000001").mkdir()  # being written: no prompts.json yet
    report.run(CONFIG, tmp_path)
    assert Page(tmp_path).videos == [later[0], first[0]]


def test_many_and_large_videos_are_left_out(tmp_path, monkeypatch):
    prompts = [f"prompt {i}" for i in range(14)]
    for step in (10, 20, 30):
        latest = write_samples(tmp_path, step, prompts)
    report.run(CONFIG, tmp_path)
    videos = Page(tmp_path).videos
    assert len(videos) == sections._MOST_VIDEOS
    assert videos[::3] == latest[: sections._MOST_PROMPTS]
    monkeypatch.setattr(sections, "_SAMPLE_BYTES", sum(map(len, latest[:3])))
    report.run(CONFIG, tmp_path)
    page = Page(tmp_path)
    assert page.videos == latest[:3]
    assert page.inside("p").count("too large for this page") == sections._MOST_PROMPTS - 3


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "fidelity.json").write_text('{"seen": ')
    with pytest.raises(ValueError, match=r"fidelity\.json: not JSON"):
        report.run(CONFIG, tmp_path)
    assert not (tmp_path / "report.html").exists()
