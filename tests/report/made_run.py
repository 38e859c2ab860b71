"""Writes small workdirs with real videos and metrics, and reads their reports back."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
from ml_collections import ConfigDict

from opensora_jax.data import moving_shapes, video_io
from opensora_jax.train.metrics_log import MetricsWriter

CONFIG = ConfigDict({"seed": 7, "sample": {"prompts": ("<b>bold</b>",)}})
PROMPTS = ("a red circle moves up", "<script>alert('x')</script> & \"quoted\"")
N_CODES = 16
SECTIONS = [
    "Samples",
    "Does a sample show what its caption says?",
    "DiT training",
    "What the VQ-VAE keeps of a video",
    "Codebook use",
    "VQ-VAE training",
    "Dataset",
    "How it was made",
]
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
        self.texts.append((self._open[-1] if self._open else "", " ".join(data.split())))

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


def write_vqvae(workdir, videos="held_out"):
    samples = workdir / "vqvae" / "samples"
    samples.mkdir(parents=True)
    for step in (999_999, 1_000_000):
        video = moving_shapes.render(np.random.default_rng(step), "blue", "square", "up", 4, 32)
        video_io.write_video(samples / f"step{step:06d}.mp4", video, fps=8)
    shares = {f"detected_{name}": 0.75 for name in ("all", "color", "shape", "direction")}
    counts = [0, 0, 0, *range(1, N_CODES - 2)]
    figures = {
        "step": 1_000_000,
        "videos": videos,
        "psnr": 27.53,
        "ssim": 0.9,
        "perplexity": 9.0,
    }
    np.save(workdir / "vqvae" / "code_counts.npy", counts)
    (workdir / "vqvae" / "reconstruction.json").write_text(json.dumps(figures | shares))
    writer = MetricsWriter(workdir / "vqvae", 0)
    writer.write(50, {"loss": 1.0, "perplexity": float("nan"), "tokens_per_second": 9e4})
    writer.write(100, {"loss": 0.01, "perplexity": 8.0, "tokens_per_second": 9e4})
    writer.write(100, {f"{videos}/psnr": 27.5, f"{videos}/perplexity": 9.0})
    with (workdir / "vqvae" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 100, "loss": null, "grad_norm": null, "held_out/ssim": NaN}\n')
    return (samples / "step1000000.mp4").read_bytes()


def write_rest(workdir):
    shares = {"all": 0.5, "color": 1.0, "shape": 0.625, "direction": 0.875}
    fidelity = {
        "step": 1500,
        "seen": shares,
        "held_out": shares | {"all": 0.25},
        "seconds": {"dit": 3725.0},
    }
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
