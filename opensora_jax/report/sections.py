"""What the page shows: plain text and figures from the files in a workdir.

A section whose files are missing is None.
"""

import base64
import datetime
import math
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import flax
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax.data import moving_shapes
from opensora_jax.report import charts, curves

# Browsers of phones play no more than 40 videos on a page.
_MAX_VIDEOS = 36
_MAX_PROMPTS = 12
_MAX_EARLIER_STEPS = 6
# Bytes of videos on the page, where they take a third more: the page stays below 15 MB.
_SAMPLE_BYTES = 7_000_000
_RECONSTRUCTION_BYTES = 3_000_000
_MAX_NAMES = 100  # of left-out videos


def gather(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Everything that page.html shows, by the names that it uses.

    Raises:
      ValueError: a file is not JSON.
    """
    workdir = files.absolute(workdir)
    fidelity = _read(workdir / "fidelity.json")
    reconstruction = _read(workdir / "vqvae" / "reconstruction.json")
    seconds = _read(workdir / "seconds.json") or fidelity.get("seconds", {})
    return {
        "title": f"Text to video: {workdir.name}",
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "command": _command(),
        "summary": _summary(fidelity, reconstruction, seconds),
        "samples": _samples(workdir / "dit" / "samples"),
        "fidelity": _fidelity(fidelity, reconstruction),
        "dit": curves.gather(workdir / "dit"),
        "reconstructions": _reconstructions(workdir / "vqvae" / "samples", reconstruction),
        "codebook": _codebook(workdir / "vqvae" / "code_counts.npy", reconstruction),
        "vqvae": curves.gather(workdir / "vqvae"),
        "dataset": _dataset(_read(workdir / "dataset" / "metadata.json")),
        "provenance": _provenance(workdir, seconds),
        "config": config.to_json_best_effort(indent=2),
    }


def _command():
    if "opensora_jax.main" not in sys.orig_argv:
        return None
    return shlex.join(["python", *sys.orig_argv[1:]])


def _summary(fidelity, reconstruction, seconds):
    tiles = [
        (f"{fidelity[key]['all']:.0%}", f"of samples show all of their caption, {name}")
        for key, name in (("seen", "combinations seen in training"), ("held_out", "never seen"))
        if key in fidelity
    ]
    outline = fidelity.get("outline")
    if outline:
        label = "overlap of samples with rigid outlines"
        if "real" in outline:
            label += f" (real files {outline['real']['mean']:.2f})"
        tiles.append((f"{outline['samples']['mean']:.2f}", label))
    if "psnr" in reconstruction:
        of = ", training videos" if reconstruction.get("videos") == "train" else ""
        tiles.append((f"{reconstruction['psnr']:.1f} dB", f"PSNR of VQ-VAE reconstructions{of}"))
    if seconds:
        tiles.append((_duration(sum(seconds.values())), "for all stages"))
    return tiles


def _samples(folder):
    """A card a prompt: its video of the last step, and those of earlier steps."""
    steps = {}
    for path in folder.glob("step*/prompts.json"):
        entries = _read(path, list)
        steps[_step(path.parent)] = {(e["file"], e["prompt"]): path.parent for e in entries}
    if not steps:
        return None
    last, *before = sorted(steps, reverse=True)
    shown = list(steps[last])[:_MAX_PROMPTS]
    n_earlier = min(_MAX_EARLIER_STEPS, _MAX_VIDEOS // max(len(shown), 1) - 1, len(before))
    earlier = [before[i] for i in np.linspace(len(before) - 1, 0, n_earlier).astype(int)]
    paths = {
        # The name alone: no other file of this machine gets onto the page.
        (step, key): steps[step][key] / epath.Path(key[0]).name
        for step in (last, *earlier)
        for key in shown
        if key in steps[step]
    }
    videos = _embed(paths.values(), _SAMPLE_BYTES)
    cards = [
        {
            "prompt": key[1],
            "video": videos.get(paths[last, key]),
            "earlier": [
                (step, videos[paths[step, key]])
                for step in earlier
                if paths.get((step, key)) in videos
            ],
        }
        for key in shown
    ]
    return {
        "step": last,
        "cards": cards,
        "any_earlier": bool(earlier),
        "n_prompts": len(steps[last]),
        "folder": folder,
    }


def _fidelity(fidelity, reconstruction):
    """The shares of recognized properties, between guessing and what the VQ-VAE allows."""
    counts = fidelity.get("n_samples", {})
    splits = {"seen": "Seen in training", "held_out": "Never seen together"}
    found = [
        (f"{label} ({counts[key]} samples)" if key in counts else label, fidelity[key])
        for key, label in splits.items()
        if key in fidelity
    ]
    if not found:
        return None
    columns = list(dict.fromkeys(name for _, shares in found for name in shares))
    limits = {name: reconstruction.get(f"detected_{name}") for name in columns}
    if limits["all"] is not None:
        found.append(("Real videos through the VQ-VAE: the ceiling", limits))
    if "real" in fidelity:
        found.append(("Real videos", fidelity["real"]))
    if "guessing" in fidelity:
        found.append(("Real videos, with each other's captions: guessing", fidelity["guessing"]))
    else:
        guessed = {
            "color": 1 / len(moving_shapes.COLORS),
            "shape": 1 / len(moving_shapes.SHAPES),
            "direction": 1 / len(moving_shapes.DIRECTIONS),
        }
        found.append(("Guessing", {"all": math.prod(guessed.values()), **guessed}))
    return {
        "columns": columns,
        "rows": [(label, [shares.get(name) for name in columns]) for label, shares in found],
        "step": fidelity.get("step"),
        "splits": list(splits.values()),
        "categories": [
            (name, [shares.get(key, {}).get("all") for key in splits])
            for name, shares in fidelity.get("categories", {}).items()
        ],
    }


def _reconstructions(folder, reconstruction):
    path = max(folder.glob("step*.mp4"), key=_step, default=None)
    if path is None:
        return None
    return {
        "step": _step(path),
        "path": path,
        "video": _embed([path], _RECONSTRUCTION_BYTES).get(path),
        "videos": curves.VIDEOS.get(reconstruction.get("videos"), "videos"),
    }


def _codebook(path, reconstruction):
    counts = np.asarray(reconstruction.get("code_counts", []))  # as older ones have them
    if path.exists():
        try:
            counts = np.load(path, allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise ValueError(f"{path}: no array of counts ({error})") from None
    if not counts.sum():
        return None
    figures = [(f"{np.count_nonzero(counts):,}", f"of {len(counts):,} codes used")]
    for key, label, spec in (
        ("perplexity", "perplexity", ",.0f"),
        ("psnr", "PSNR (dB)", ".1f"),
        ("ssim", "SSIM", ".3f"),
    ):
        if key in reconstruction:
            figures.append((format(reconstruction[key], spec), label))
    chart = charts.usage_chart(counts, size=(5.2, 2.5), name="codebook")
    return {"svg": chart, "figures": figures}


def _dataset(metadata):
    if not metadata:
        return None
    figures = [(f"{metadata['n_rows']:,}", "rows")] if "n_rows" in metadata else []
    figures += [(f"{n:,}", f"videos {kind}") for kind, n in metadata.get("counts", {}).items()]
    left_out = [(kind, metadata.get(kind, [])) for kind in ("filtered", "failed")]
    return {
        "figures": figures,
        "facts": [
            ("Resolution", _product(metadata.get("resolution"))),
            ("Frames per second", metadata.get("fps")),
            ("Latents (time, height, width)", _product(metadata.get("latent_shape"))),
            ("Codes", metadata.get("n_codes")),
            ("Text features", metadata.get("text_width")),
            ("Text model", metadata.get("text_model")),
            ("VQ-VAE", metadata.get("vqvae")),
        ],
        "left_out": [
            {"kind": kind, "n": len(videos), "named": videos[:_MAX_NAMES]}
            for kind, videos in left_out
            if videos
        ],
    }


def _provenance(workdir, seconds):
    """Versions, devices and time by stage."""
    devices = Counter(device.device_kind for device in jax.devices())
    return [
        ("Folder", workdir),
        ("Devices", ", ".join(f"{n} × {kind}" for kind, n in devices.items())),
        ("JAX", jax.__version__),
        ("Flax", flax.__version__),
        ("Python", platform.python_version()),
        ("Platform", platform.platform()),
        *((f"Time for {stage}", _duration(value)) for stage, value in seconds.items()),
    ]


# ---------------------------------------------------------------------------------- pieces


def _read(path: epath.Path, kind: type = dict) -> Any:
    """What a JSON file holds, or an empty `kind` where there is none."""
    return files.read_json(path, kind) if path.exists() else kind()


def _embed(paths: Iterable[epath.Path], max_bytes: int) -> dict[epath.Path, str]:
    """The files in base64: those that exist, the first while they fit."""
    videos = {}
    for path in paths:
        if not path.is_file() or path.stat().length > max_bytes:
            continue
        data = path.read_bytes()
        max_bytes -= len(data)
        videos[path] = base64.b64encode(data).decode()
    return videos


def _step(path: epath.Path) -> int:
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
