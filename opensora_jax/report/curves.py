"""What a training measured, as charts."""

import math
import re
from collections import defaultdict
from typing import Any

from etils import epath

from opensora_jax.report import charts
from opensora_jax.train.metrics_log import read_metrics

# (title, metrics as a regular expression, remark); the second group is drawn smaller.
_MAJOR = (
    ("Training loss", "loss", ""),
    (
        "Validation loss by noise level",
        r"validation_loss(/t=.*)?",
        "From t=0, clean, to t=1, noise. The lines of single levels show learning that the mean "
        "over all levels hides.",
    ),
    ("Reconstructions: PSNR (dB)", "(held_out|train)/psnr", ""),
    ("Reconstructions: SSIM", "(held_out|train)/ssim", ""),
    (
        "Reconstructions: recognized",
        r"held_out/detected_.*",
        "Share of videos whose color, shape and direction can be read from the reconstruction.",
    ),
    (
        "Codebook perplexity",
        "((held_out|train)/)?perplexity",
        "How many codes are in effective use.",
    ),
)
_MINOR = (
    ("Gradient norm", "grad_norm", ""),
    ("Learning rate", "learning_rate", ""),
    ("Tokens per second", "tokens_per_second", ""),
    ("Waiting for data (share)", "data_wait_share", ""),
)
# The videos that a tokenizer's evaluation reconstructs, by what its metrics' names begin with.
VIDEOS = {"held_out": "held-out videos", "train": "training videos"}
_LABELS = {"validation_loss": "mean", "perplexity": "training batches"} | {
    f"{prefix}/{metric}": videos
    for prefix, videos in VIDEOS.items()
    for metric in ("psnr", "ssim", "perplexity")
}


def gather(folder: epath.Path) -> dict[str, Any] | None:
    """The charts of `folder`/metrics.jsonl, or None where there is nothing to draw."""
    series = defaultdict(list)
    for metrics in read_metrics(folder / "metrics.jsonl"):
        for name, value in metrics.items():
            if name != "step" and value is not None and math.isfinite(value):
                series[name].append((metrics["step"], value))
    if not series:
        return None
    return {
        "step": max(points[-1][0] for points in series.values()),
        "major": _charts(folder.name, series, _MAJOR, (5.2, 2.5)),
        "minor": _charts(folder.name, series, _MINOR, (3.0, 1.9)),
    }


def _charts(training, series, kinds, size):
    found = []
    for title, pattern, remark in kinds:
        names = [name for name in series if re.fullmatch(pattern, name)]
        if not names:
            continue
        lines = {_label(name): series[name] for name in names}
        if len(names) == 1:
            value = series[names[0]][-1][1]
            of = ", of training videos" if names[0].startswith("train/") else ""
            remark = f"{value:{',.0f' if value >= 1000 else '.4g'}} at the end{of}. {remark}"
        svg = charts.line_chart(lines, x_label="step", size=size, name=f"{training} {title}")
        found.append({"title": title, "svg": svg, "caption": remark})
    return found


def _label(name):
    return _LABELS.get(name, name.rpartition("/")[2].removeprefix("detected_"))
