"""The report of a small workdir, read back by an HTML parser."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from made_run import (
    CONFIG,
    N_CODES,
    PROMPTS,
    SECTIONS,
    Page,
    write_dit_metrics,
    write_rest,
    write_samples,
    write_vqvae,
)

from opensora_jax.report import sections
from opensora_jax.stages import report
from opensora_jax.train.metrics_log import MetricsWriter


@dataclasses.dataclass(frozen=True)
class Run:
    workdir: Path
    page: Page
    videos: list[bytes]  # that the page should show


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workdir with everything in it."""
    workdir = tmp_path_factory.mktemp("whole")
    earlier, latest = write_samples(workdir, 20), write_samples(workdir, 50)
    reconstruction = write_vqvae(workdir)
    write_dit_metrics(workdir)
    write_rest(workdir)
    report.run(CONFIG, workdir)
    assert not list(workdir.glob("*.tmp"))
    videos = [latest[0], earlier[0], latest[1], earlier[1], reconstruction]
    return Run(workdir, Page(workdir), videos)


def test_videos_are_the_files_and_loop(whole):
    assert whole.page.videos == whole.videos
    for video in whole.page.attributes("video"):
        assert {"autoplay", "loop", "muted", "playsinline"} <= video.keys()


def test_nothing_is_loaded_and_nothing_runs(whole):
    page = whole.page
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:video/mp4;"))
        assert not [name for name in attributes if name.startswith("on")]


def test_text_is_escaped(whole):
    page = whole.page
    assert [text for text in page.inside("p") if text in PROMPTS] == list(PROMPTS)
    assert "<i>.mp4" in page.inside("td")
    assert "truncated & damaged" in page.inside("td")
    assert json.loads("".join(page.inside("pre"))) == json.loads(CONFIG.to_json())


def test_sections_and_figures(whole):
    page = whole.page
    assert page.inside("h2") == SECTIONS
    tiles = page.inside("b")
    for value in ("50%", "25%", "27.5 dB", "1 h 02 min", str(N_CODES - 3), "1,234", "411"):
        assert value in tiles
    cells = page.inside("td")
    assert cells[:4] == ["50%", "100%", "62%", "88%"]
    assert cells[8:16] == ["75%"] * 4 + ["2%", "25%", "33%", "25%"]  # the ceiling, and guessing
    paragraphs = page.inside("p")
    for remark in (
        "After 50 training steps. The small videos show the same prompts after fewer steps.",
        "Held-out videos and what is left of them as codes, after 1,000,000 training steps.",
    ):
        assert remark in paragraphs
    assert any(text.endswith("Measured after 1,500 training steps.") for text in paragraphs)


def test_a_battery_of_properties_and_categories(tmp_path):
    shares = {"all": 0.5, "color": 1.0, "count": 0.625}
    fidelity = {
        "n_samples": {"seen": 12, "held_out": 8},
        "seen": shares,
        "held_out": {"all": 0.25, "color": 0.75},
        "real": {"all": 1.0, "color": 1.0, "count": 1.0},
        "guessing": {"all": 0.01, "color": 0.24, "count": 0.375},
        "categories": {"count": {"seen": shares, "held_out": {"all": 0.125}}, "<b>": {}},
    }
    (tmp_path / "fidelity.json").write_text(json.dumps(fidelity))
    report.run(CONFIG, tmp_path)
    page = Page(tmp_path)
    assert page.inside("th")[:3] == ["all", "color", "count"]
    cells = ["50%", "100%", "62%", "25%", "75%", "100%", "100%", "100%", "1%", "24%", "38%"]
    assert page.inside("td")[: len(cells) + 2] == [*cells, "50%", "12%"]
    assert "<b>" in page.inside("th")


def test_curves(whole):
    page = whole.page
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
    assert len(videos) == sections._MAX_VIDEOS
    assert videos[::3] == latest[: sections._MAX_PROMPTS]
    monkeypatch.setattr(sections, "_SAMPLE_BYTES", sum(map(len, latest[:3])))
    report.run(CONFIG, tmp_path)
    page = Page(tmp_path)
    assert page.videos == latest[:3]
    assert page.inside("p").count("too large for this page") == sections._MAX_PROMPTS - 3


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("dit/samples", "Samples"),
        ("fidelity.json", "Does a sample show what its caption says?"),
        ("dit/metrics.jsonl", "DiT training"),
        ("vqvae/samples", "What the VQ-VAE keeps of a video"),
        ("vqvae/code_counts.npy", "Codebook use"),
        ("vqvae/metrics.jsonl", "VQ-VAE training"),
        ("dataset/metadata.json", "Dataset"),
    ],
)
def test_without_its_file_a_section_is_left_out(whole, tmp_path, name, section):
    workdir = shutil.copytree(whole.workdir, tmp_path / "copy")
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report.run(CONFIG, workdir)
    assert Page(workdir).inside("h2") == [heading for heading in SECTIONS if heading != section]


def test_reconstructions_of_training_videos_say_so(tmp_path):
    write_vqvae(tmp_path, "train")
    report.run(CONFIG, tmp_path)
    page = Page(tmp_path)
    assert "PSNR of VQ-VAE reconstructions, training videos" in page.inside("span")
    assert "27.5 at the end, of training videos." in page.inside("figcaption")
    assert page.inside("text").count("training videos") == 1  # beside the training batches
    assert any(text.startswith("Training videos and what is left") for text in page.inside("p"))
    assert "eld-out" not in page.source


def test_reconstructions_of_both_kinds_are_two_lines(tmp_path):
    writer = MetricsWriter(tmp_path / "vqvae", 0)
    writer.write(100, {"train/psnr": 20.0, "train/perplexity": 5.0})
    writer.write(200, {"held_out/psnr": 21.0, "held_out/perplexity": 6.0})
    report.run(CONFIG, tmp_path)
    page = Page(tmp_path)
    assert page.inside("h3") == ["Reconstructions: PSNR (dB)", "Codebook perplexity"]
    for label in ("training videos", "held-out videos"):
        assert page.inside("text").count(label) == 2


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("fidelity.json", '{"seen": ', "not JSON"),
        ("seconds.json", "\xff", "not JSON"),
        ("vqvae/reconstruction.json", "[" * 200_000, "not JSON"),
        ("dataset/metadata.json", "[1]", "holds a list: expected an object"),
        ("dit/samples/step000010/prompts.json", "{}", "holds a dict: expected an array"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, text, expected):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "latin-1")
    with pytest.raises(ValueError, match=f"^{path}: {expected}[^\n]*$"):
        report.run(CONFIG, tmp_path)
    assert not (tmp_path / "report.html").exists()
