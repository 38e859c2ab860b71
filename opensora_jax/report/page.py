"""The stage that shows what a run made, on one page that needs nothing beside it.

A section is a function from files in the workdir to HTML; it returns "" where they are missing.
"""

import base64
import datetime
import json
import logging
import math
import os
import platform
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template

import flax
import jax
import numpy as np
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax.data import moving_shapes
from opensora_jax.report import charts
from opensora_jax.train.metrics_log import read_metrics

logger = logging.getLogger(__name__)

# Browsers of phones play no more than 40 videos on a page.
_MOST_VIDEOS = 36
_MOST_PROMPTS = 12
_MOST_EARLIER_STEPS = 6
# Bytes of videos on the page, where they take a third more: the page stays below 15 MB.
_SAMPLE_BYTES = 7_000_000
_RECONSTRUCTION_BYTES = 3_000_000
_MOST_NAMES = 100  # of left-out videos

_STAGE_NAMES = {"vqvae": "VQ-VAE", "dit": "DiT"}
# (title, metrics as a regular expression, remark); the second group is drawn smaller.
_CURVES = (
    ("Training loss", "loss", ""),
    (
        "Validation loss by noise level",
        r"validation_loss(/t=.*)?",
        "From t=0, clean, to t=1, noise. The lines of single levels show learning that the mean "
        "over all levels hides.",
    ),
    ("Reconstructions: PSNR (dB)", "held_out/psnr", ""),
    ("Reconstructions: SSIM", "held_out/ssim", ""),
    (
        "Reconstructions: recognized",
        r"held_out/detected_.*",
        "Share of videos whose color, shape and direction can be read from the reconstruction.",
    ),
    ("Codebook perplexity", r"(held_out/)?perplexity", "How many codes are in effective use."),
)
_MINOR_CURVES = (
    ("Gradient norm", "grad_norm", ""),
    ("Learning rate", "learning_rate", ""),
    ("Tokens per second", "tokens_per_second", ""),
    ("Waiting for data (share)", "data_wait_share", ""),
)
_LABELS = {
    "validation_loss": "mean",
    "perplexity": "training batches",
    "held_out/perplexity": "evaluation videos",
}
_FIDELITY_COLUMNS = ("all", "color", "shape", "direction")


def run(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes `workdir`/report.html from what the other stages left; always anew.

    Raises:
      FileNotFoundError: no workdir.
      ValueError: a file of another stage is not JSON.
    """
    if jax.process_index():
        return
    workdir = Path(workdir)
    fidelity = _read_json(workdir / "fidelity.json") or {}
    reconstruction = _read_json(workdir / "vqvae" / "reconstruction.json") or {}
    seconds = _read_json(workdir / "seconds.json") or fidelity.get("seconds", {})
    title = f"Text to video: {workdir.resolve().name}"
    sections = (
        _header(title),
        _summary(fidelity, reconstruction, seconds),
        _samples(workdir / "dit" / "samples"),
        _fidelity(fidelity, reconstruction),
        _curves(workdir, "dit"),
        _reconstructions(workdir / "vqvae" / "samples"),
        _codebook(reconstruction),
        _curves(workdir, "vqvae"),
        _dataset(_read_json(workdir / "dataset" / "metadata.json") or {}),
        _made(workdir, seconds, config),
    )
    template = Template(Path(__file__).with_name("page.html.template").read_text("utf-8"))
    page = template.substitute(title=escape(title), body="\n".join(filter(None, sections)))
    path = workdir / "report.html"
    files.write_text(path, page)
    logger.info("report: %s (%.1f MB)", path, path.stat().st_size / 1e6)


def _header(title):
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    command = ""
    if "opensora_jax.main" in sys.orig_argv:
        command = f" by <code>{escape(shlex.join(['python', *sys.orig_argv[1:]]))}</code>"
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="quiet small">Written {written}{command}</p></header>'
    )


def _summary(fidelity, reconstruction, seconds):
    tiles = {
        f"of samples show all of their caption, {name}": f"{fidelity[key]['all']:.0%}"
        for key, name in (("seen", "combinations seen in training"), ("held_out", "never seen"))
        if key in fidelity
    }
    if "psnr" in reconstruction:
        tiles["PSNR of VQ-VAE reconstructions"] = f"{reconstruction['psnr']:.1f} dB"
    if seconds:
        tiles["for all stages"] = _duration(sum(seconds.values()))
    return _tiles(tiles)


def _samples(folder):
    """A card a prompt: its video of the last step, and below it those of earlier steps."""
    steps = {}
    for path in folder.glob("step*/prompts.json"):
        entries = _read_json(path)
        steps[_step(path.parent)] = {(e["file"], e["prompt"]): path.parent for e in entries}
    if not steps:
        return ""
    last, *before = sorted(steps, reverse=True)
    shown = list(steps[last])[:_MOST_PROMPTS]
    n_earlier = min(_MOST_EARLIER_STEPS, _MOST_VIDEOS // max(len(shown), 1) - 1, len(before))
    earlier = [before[i] for i in np.linspace(len(before) - 1, 0, n_earlier).astype(int)]
    paths = {
        (step, key): steps[step][key] / key[0]
        for step in (last, *earlier)
        for key in shown
        if key in steps[step]
    }
    videos = _embed(paths.values(), _SAMPLE_BYTES)
    cards = []
    for key in shown:
        strip = [
            f"<figure>{videos[paths[step, key]]}<figcaption>{step:,}</figcaption></figure>"
            for step in earlier
            if videos.get(paths.get((step, key)))
        ]
        row = f'<div class="earlier">{"".join(strip)}</div>' if strip else ""
        large = videos.get(paths[last, key], '<p class="quiet">too large for this page</p>')
        prompt = f'<p class="prompt">{escape(key[1])}</p>'
        cards.append(f'<article class="card">{large}{prompt}{row}</article>')
    remark = f"After {last:,} training steps."
    if earlier:
        remark += " The small videos show the same prompts after fewer steps."
    if len(shown) < len(steps[last]):
        remark += f" {len(shown)} of {len(steps[last])} prompts; the others are in {folder}."
    return _section("Samples", remark, f'<div class="grid samples">{"".join(cards)}</div>')


def _fidelity(fidelity, reconstruction):
    """The table of recognized attributes, between guessing and what the VQ-VAE allows."""
    counts = fidelity.get("n_samples", {})
    rows = [
        (f"{label} ({counts[key]} samples)" if key in counts else label, fidelity[key])
        for key, label in (("seen", "Seen in training"), ("held_out", "Never seen together"))
        if key in fidelity
    ]
    if not rows:
        return ""
    by_attribute = {
        "color": 1 / len(moving_shapes.COLORS),
        "shape": 1 / len(moving_shapes.SHAPES),
        "direction": 1 / len(moving_shapes.DIRECTIONS),
    }
    if "detected_all" in reconstruction:
        limits = {name: reconstruction[f"detected_{name}"] for name in _FIDELITY_COLUMNS}
        rows.append(("Real videos through the VQ-VAE: the ceiling", limits))
    rows.append(("Guessing", {"all": math.prod(by_attribute.values()), **by_attribute}))
    head = "".join(f"<th>{name}</th>" for name in ("", *_FIDELITY_COLUMNS))
    body = "".join(
        f"<tr><th>{label}</th>{''.join(_share_cell(shares[c]) for c in _FIDELITY_COLUMNS)}</tr>"
        for label, shares in rows
    )
    return _section(
        "Does a sample show what its caption says?",
        "Share of the samples whose pixels show the color, the shape and the direction of the "
        "caption, for combinations that were in the training data and for others that were not.",
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>",
    )


def _share_cell(share):
    return f'<td class="share" style="--of:{share:.1%}">{share:.0%}</td>'


def _curves(workdir, stage):
    series = defaultdict(list)
    for metrics in read_metrics(workdir / stage / "metrics.jsonl"):
        for name, value in metrics.items():
            if name != "step" and math.isfinite(value):
                series[name].append((metrics["step"], value))
    if not series:
        return ""
    grids = []
    for curves, size, kind in ((_CURVES, (5.2, 2.5), ""), (_MINOR_CURVES, (3.0, 1.9), " minor")):
        charts = [_curve(stage, series, size, *curve) for curve in curves]
        if any(charts):
            grids.append(f'<div class="grid charts{kind}">{"".join(charts)}</div>')
    last = max(points[-1][0] for points in series.values())
    return _section(f"{_STAGE_NAMES[stage]} training", f"{last:,} steps.", "\n".join(grids))


def _curve(stage, series, size, title, pattern, remark):
    names = [name for name in series if re.fullmatch(pattern, name)]
    if not names:
        return ""
    lines = {
        _LABELS.get(name, name.rpartition("/")[2].removeprefix("detected_")): series[name]
        for name in names
    }
    svg = charts.line_chart(lines, x_label="step", size=size, name=f"{stage} {title}")
    if len(names) == 1:
        value = series[names[0]][-1][1]
        remark = f"{value:{',.0f' if value >= 1000 else '.4g'}} at the end. {remark}"
    return (
        f'<figure class="card"><h3>{escape(title)}</h3>{svg}'
        f"<figcaption>{escape(remark)}</figcaption></figure>"
    )


def _reconstructions(folder):
    path = max(folder.glob("step*.mp4"), key=_step, default=None)
    if path is None:
        return ""
    video = _embed([path], _RECONSTRUCTION_BYTES).get(path, f"too large for this page: {path}")
    return _section(
        "What the VQ-VAE keeps of a video",
        f"Videos and what is left of them as codes, after {_step(path):,} training steps.",
        f'<figure class="card rows"><span>original</span>{video}'
        "<span>reconstructed</span></figure>",
    )


def _codebook(reconstruction):
    counts = np.asarray(reconstruction.get("code_counts", []))
    if not counts.sum():
        return ""
    tiles = {f"of {len(counts):,} codes used": f"{np.count_nonzero(counts):,}"}
    for key, label, spec in (
        ("perplexity", "perplexity", ",.0f"),
        ("psnr", "PSNR (dB)", ".1f"),
        ("ssim", "SSIM", ".3f"),
    ):
        if key in reconstruction:
            tiles[label] = format(reconstruction[key], spec)
    chart = charts.usage_chart(counts, size=(5.2, 2.5), name="codebook")
    return _section(
        "Codebook use",
        "How often each code occurs in these videos, in multiples of the mean (dashed).",
        f'<div class="grid charts"><figure class="card">{chart}</figure>{_tiles(tiles)}</div>',
    )


def _dataset(metadata):
    if not metadata:
        return ""
    counts = metadata.get("counts", {})
    tiles = {"rows": f"{metadata['n_rows']:,}"} if "n_rows" in metadata else {}
    tiles |= {f"videos {kind}": f"{n:,}" for kind, n in counts.items()}
    facts = {
        "Resolution": _product(metadata.get("resolution")),
        "Frames per second": metadata.get("fps"),
        "Latents (time, height, width)": _product(metadata.get("latent_shape")),
        "Codes": metadata.get("n_codes"),
        "Text features": metadata.get("text_width"),
        "Text model": metadata.get("text_model"),
        "VQ-VAE": metadata.get("vqvae"),
    }
    left_out = "".join(_left_out(kind, metadata.get(kind, [])) for kind in ("filtered", "failed"))
    return _section(
        "Dataset", "", f'{_tiles(tiles)}<div class="card">{_table(facts)}</div>{left_out}'
    )


def _left_out(kind, videos):
    if not videos:
        return ""
    rows = "".join(
        f"<tr><td>{escape(video['file'])}</td><td>{escape(video['reason'])}</td></tr>"
        for video in videos[:_MOST_NAMES]
    )
    more = len(videos) - _MOST_NAMES
    note = f"<p>... and {more:,} more: see metadata.json</p>" if more > 0 else ""
    return (
        f'<details class="card"><summary>Videos {kind}: {len(videos):,}</summary>'
        f'<table class="small">{rows}</table>{note}</details>'
    )


def _made(workdir, seconds, config):
    """Versions, devices, time by stage and the configuration."""
    devices = Counter(device.device_kind for device in jax.devices())
    facts = {
        "Folder": workdir.resolve(),
        "Devices": ", ".join(f"{n} × {kind}" for kind, n in devices.items()),
        "JAX": jax.__version__,
        "Flax": flax.__version__,
        "Python": platform.python_version(),
        "Platform": platform.platform(),
    }
    facts |= {f"Time for {stage}": _duration(value) for stage, value in seconds.items()}
    text = escape(config.to_json_best_effort(indent=2))
    return _section(
        "How it was made",
        "",
        f'<div class="card">{_table(facts)}</div>'
        f'<details class="card"><summary>Configuration</summary><pre>{text}</pre></details>',
    )


# ---------------------------------------------------------------------------------- pieces


def _section(heading: str, remark: str, content: str) -> str:
    """`remark` is text, `content` HTML."""
    remark = f'<p class="quiet">{escape(remark)}</p>' if remark else ""
    return f"<section><h2>{escape(heading)}</h2>{remark}{content}</section>"


def _tiles(values: Mapping[str, str]) -> str:
    """Large numbers over what they mean."""
    tiles = "".join(
        f'<div class="card tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in values.items()
    )
    return f'<div class="grid tiles">{tiles}</div>' if tiles else ""


def _table(facts: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f'<table class="small">{rows}</table>'


def _embed(paths: Iterable[Path], most_bytes: int) -> dict[Path, str]:
    """`<video>` elements that hold the files: those that exist, the first while they fit."""
    videos = {}
    for path in paths:
        if not path.is_file() or path.stat().st_size > most_bytes:
            continue
        data = path.read_bytes()
        most_bytes -= len(data)
        source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        videos[path] = f'<video autoplay loop muted playsinline src="{source}"></video>'
    return videos


def _read_json(path: Path):
    """None where there is no file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _step(path: Path) -> int:
    """Of a file or folder named stepNNNNNN."""
    return int(path.stem.removeprefix("step"))


def _product(sides) -> str | None:
    return " × ".join(map(str, sides)) if sides else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
