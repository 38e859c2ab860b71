"""The page of a dataset: what a model that is trained on it will see."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.data.dataset import LatentDataset
from opensora_jax.data.survey import Survey, by_reason
from opensora_jax.report import charts, page

_MAX_NAMES = 20  # of videos left out for one reason
_CHART = (5.2, 2.5)  # inches
# Of `looks.FIGURES`: title, unit and meaning.
_FIGURES = {
    "motion": ("Motion", "of 255", "by which pixels differ from one frame to the next"),
    "brightness": ("Brightness", "of 255", "of the brightest frame"),
    "frozen": ("Frozen", "share of a clip", "that is one run of equal frames"),
    "side": ("Size", "pixels", "of the file's shorter side"),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """A decoded video on the page.

    Attributes:
      video: an MP4 file in base64.
      caption: of it; empty where the dataset says none.
      file: its name.
    """

    video: str
    caption: str
    file: str


def write(
    path: epath.PathLike,
    dataset: LatentDataset,
    survey: Survey,
    examples: list[Example],
    pairs: list[tuple[Example, Example, float]],
) -> None:
    """Writes the page.

    Args:
      examples: some videos.
      pairs: of videos that are alike, and the share of codes that they have in common.
    """
    page.render(path, "dataset.html", gather(dataset, survey, examples, pairs))


def gather(dataset, survey, examples, pairs) -> dict[str, Any]:
    """Everything that dataset.html shows, by the names that it uses."""
    metadata, counts = dataset.metadata, dataset.metadata.get("counts", {})
    clip_counts = metadata.get("clip_counts", {})
    kind = "clips" if clip_counts else "videos"
    figures = [(f"{len(dataset):,}", "rows"), (f"{len(survey.seconds):,}", kind)]
    figures += [(f"{len(survey.tokens):,}", "distinct captions")]
    figures += [(f"{survey.seconds.sum() / 3600:,.1f} h", "of video")]
    figures += [(f"{n:,}", f"videos {kind}") for kind, n in counts.items() if kind != "kept" and n]
    if clip_counts:
        figures += [(f"{counts['kept']:,}", "videos that they are of")]
        figures += [(f"{clip_counts['filtered']:,}", "clips filtered")]
    return {
        "title": f"Dataset: {dataset.folder.name}",
        "figures": figures,
        "facts": _facts(dataset),
        "left_out": _left_out(metadata),
        "filter_charts": list(_filter_charts(metadata)),
        "charts": _charts(dataset, survey),
        "n_looked_at": len(survey.rows),
        "words": survey.words,
        "codebook": _codebook(dataset),
        "examples": examples,
        "pairs": pairs,
        "n_alike": survey.n_alike,
        "same_names": 0 if clip_counts else survey.same_names,
    }


def _facts(dataset):
    metadata, (h, w) = dataset.metadata, dataset.grid
    height, width = metadata["resolution"]
    lengths = np.unique(dataset.index.video_frames)
    shown = " ".join(map(str, lengths[:12])) + (" ..." if len(lengths) > 12 else "")
    return [
        ("Frames", f"{height} x {width} pixels"),
        ("Latents", f"{h} x {w}, {shown} frames"),
        ("Frames a second", f"{metadata['fps']:g}"),
        ("Frames a window", metadata.get("window")),
        ("Tokenizer", metadata["vqvae"]),
        ("Text model", metadata["text_model"]),
        ("Made by", metadata.get("command")),
    ]


def _left_out(metadata):
    """Reasons, those that differ in numbers alone together, the most frequent first."""
    found = []
    for kind in ("filtered", "failed"):
        for reason, entries in by_reason(metadata.get(kind, [])).items():
            found.append(
                {
                    "kind": kind,
                    "reason": files.short(reason) if len(reason) > 300 else reason,
                    "n": len(entries),
                    "named": entries[:_MAX_NAMES],
                }
            )
    return sorted(found, key=lambda group: -group["n"])


def _charts(dataset, survey):
    words = [len(caption.split()) for caption in survey.captions]
    for title, values, label, caption in (
        ("Length", survey.seconds, "seconds", "of all videos"),
        (
            "Motion",
            100 * survey.motion,
            "% of codes that change",
            "from one latent frame to the next; at 0 nothing moves",
        ),
        ("Captions", words, "words", "of one caption of each video looked at"),
        ("Tokens", survey.tokens, "tokens", "of all captions, beginning and end included"),
    ):
        if len(values):
            svg = charts.histogram(values, x_label=label, size=_CHART, name=f"hist-{title}")
            yield {"title": title, "svg": svg, "caption": caption}


def _filter_charts(metadata):
    """What clips showed that were looked at to filter them."""
    for name, figure in metadata.get("figures", {}).items():
        title, label, caption = _FIGURES[name]
        counts = {kind: figure[kind] for kind in ("kept", "filtered")}
        options = {"x_label": label, "size": _CHART, "name": f"figure-{name}"}
        svg = charts.counts_chart(figure["edges"], counts, **options)
        yield {"title": title, "svg": svg, "caption": caption}


def _codebook(dataset):
    counts = dataset.code_counts
    p = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-(p * np.log(p)).sum())
    return {
        "svg": charts.usage_chart(counts, size=_CHART, name="codebook"),
        "figures": [
            (f"{np.count_nonzero(counts):,}", f"of {len(counts):,} codes used"),
            (f"{perplexity:,.0f}", "perplexity"),
        ],
    }
