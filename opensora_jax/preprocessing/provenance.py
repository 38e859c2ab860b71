"""What a dataset was made of and how, for its metadata.json."""

import hashlib
import shlex
from pathlib import Path

from etils import epath

from opensora_jax import files
from opensora_jax.data import archives
from opensora_jax.data.video_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from opensora_jax.preprocessing.options import CURATION, VIDEO_TIMEOUT, Options


def sha256(path):
    if epath.Path(path).is_dir():  # of captions beside videos: by names and sizes
        read = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, ".txt", archives.SUFFIX)
        found = [
            f"{p.relative_to(path)} {p.stat().length}"
            for p in files.walk(path)
            if p.suffix.lower() in read and p.exists()
        ]
        return hashlib.sha256("\n".join(found).encode(errors="surrogateescape")).hexdigest()[:16]
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def text_model_identity(text_model):
    """A name on the hub stands for itself; a folder, which may be moved, for what is in it."""
    folder = Path(text_model)
    if not folder.is_dir():
        return str(text_model)
    paths = (path for path in sorted(folder.iterdir()) if path.is_file())
    contents = " ".join(f"{path.name} {sha256(path)}" for path in paths)
    return hashlib.sha256(contents.encode()).hexdigest()[:16]


def location(name_or_folder):
    folder = Path(name_or_folder)
    return str(folder.absolute() if folder.is_dir() else name_or_folder)


def command(captions, videos, output, options: Options, settings):
    """The command line that goes on with this dataset."""
    if "bucket" in settings:
        # What made all buckets together.
        output = epath.Path(output).parent
        size = ["--buckets", settings["buckets"]]
        for key in ("bucket_tokens", "patch"):
            size += [f"--{key}", settings[key]] if key in settings else []
        settings = {**settings, "n_frames": settings.get("most_frames")}
    else:
        size = ["--resolution", *settings["resolution"]]
    words = ["python", "data_prep/preprocess_data.py", "-c", captions, "-v", videos, "-o", output]
    words += ["--vqvae", options.vqvae, "--text_model", options.text_model, *size]
    for key in ("fps", "max_frames", "n_frames", "window", "videos_per_part"):
        words += [f"--{key}", settings[key] or 0]
    words += ["--flat"] if "flat" in settings else []
    words += ["--tile", settings["tile"]] if "tile" in settings else []
    if "columns" in settings:
        file_column, caption_column = settings["columns"]
        words += ["--file_column", file_column, "--caption_column", caption_column]
    for name in CURATION:
        value = settings.get(name)
        words += [f"--{name}", *([] if value is True else [value])] if value else []
    words += ["--strict"] if options.strict else []
    if options.video_timeout != VIDEO_TIMEOUT:
        words += ["--video_timeout", options.video_timeout or 0]
    words += ["--engine", options.engine] if options.engine != "local" else []
    return shlex.join(map(str, words))
