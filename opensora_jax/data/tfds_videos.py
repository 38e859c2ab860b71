"""Videos and texts of any dataset of `tensorflow-datasets` -> video files and a captions file."""

import concurrent.futures
import functools
import operator
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from opensora_jax import files
from opensora_jax.data import tfds, video_io
from opensora_jax.files import short

_MOST_WORDS = 300  # of what the library says, in characters


def write_videos(
    name: str, folder: Path, *, video: str, text: str, split: str, fps: float
) -> tuple[Path, Path]:
    """Writes what `folder` does not have yet; returns (captions file, folder of the videos).

    Frames are kept as they are, pixel by pixel.

    Args:
      name: of the dataset, in TFDS_DATA_DIR, which is prepared if it can be without TensorFlow; or
        the folder of a prepared one.
      video, text: features: (T, H, W, 1 or 3) uint8, and a text, several, or a class with a name;
        `a/b` is b in a.
      split: of the dataset.
      fps: frames a second of the videos, which such a dataset does not say.

    Raises:
      ValueError: no such dataset, split or feature, or it is of another kind; or the folder was
        made of another one.
    """
    with tempfile.TemporaryDirectory() as view:
        source, text_feature = _open(name, Path(view), split, video, text)
        settings = {"name": name, "split": split, "video": video, "text": text, "fps": fps}
        files.record_settings(folder / "tfds.json", settings)
        captions, videos = folder / "captions.json", folder / "videos"
        if captions.exists():
            return captions, videos
        videos.mkdir(exist_ok=True)

        def write(i: int) -> dict[str, Any]:
            values, path = source[i], videos / f"{i:08d}.mkv"
            if not path.exists():
                video_io.write_video(path, _frames(_get(values, video), f"{name}: {video}"), fps)
            return {"file": path.name, "captions": _texts(_get(values, text), text_feature)}

        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            done = pool.map(write, range(len(source)))
            entries = list(tqdm(done, total=len(source), desc="videos", unit="video"))
        files.write_json(captions, entries)
    return captions, videos


def _open(name: str, view: Path, split: str, video: str, text: str) -> tuple[Any, Any]:
    """(the records, the feature of the texts)."""
    library = tfds.library()
    try:
        _link(_find(library, name), view)
        builder = library.builder_from_directory(view)
        features, source = builder.info.features, builder.as_data_source(split=split)
        len(source)
    except Exception as error:  # of all kinds
        said = " ".join(str(error).split())[:_MOST_WORDS]
        raise ValueError(
            f"--tfds={name}: cannot be read: {said}; expected the name of a dataset, or the folder "
            "of one, as DATA_DIR/NAME/1.0.0, that was prepared with file_format='array_record', "
            "where TensorFlow is installed if it asks for that"
        ) from None
    for flag, feature in (("--tfds_video", video), ("--tfds_text", text)):
        try:
            found = _get(features, feature)
        except (KeyError, TypeError):
            raise ValueError(
                f"{flag}={feature}: no such feature of {name}: expected one of {_names(features)}"
            ) from None
    return source, found


def _find(library: Any, name: str) -> Path:
    """The folder of a prepared dataset, which is prepared if there is none."""
    for folder in (Path(name), Path(library.core.constants.DATA_DIR) / name.replace(":", "/")):
        # Configurations and versions are folders in folders, half-written ones too.
        found = [p.parent for p in folder.rglob("features.json") if "incomplete" not in str(p)]
        if len(found) > 1:
            raise ValueError(f"{short(name)} is one of {', '.join(map(str, sorted(found)))}")
        if found:
            return found[0]
    builder = library.builder(name, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def _link(folder: Path, view: Path) -> None:
    """Links a dataset's files into another folder, with features that need no TensorFlow."""
    for path in folder.iterdir():
        if path.name != "features.json":
            (view / path.name).symlink_to(path.absolute())
    features = _without_video(files.read_json(folder / "features.json"))
    files.write_json(view / "features.json", features)


def _without_video(value: Any) -> Any:
    """Features with sequences of images in the place of videos, as which they are stored.

    The library's own class for videos cannot be made without TensorFlow.
    """
    if not isinstance(value, dict):
        return value
    if "video" not in value or not value.get("pythonClassName", "").endswith(".Video"):
        return {key: _without_video(each) for key, each in value.items()}
    video, package = value["video"], "tensorflow_datasets.core.features"
    length, *shape = video.get("shape", {}).get("dimensions", ["-1", "-1", "-1", "3"])
    image = {
        "dtype": video.get("dtype", "uint8"),
        "encodingFormat": video.get("encodingFormat", "png"),
        "shape": {"dimensions": shape},
    }
    feature = {"pythonClassName": f"{package}.image_feature.Image", "image": image}
    return {
        "pythonClassName": f"{package}.sequence_feature.Sequence",
        "sequence": {"feature": feature, "length": length},
    }


def _names(features: Any, before: str = "") -> str:
    """Of all features, also those in others, with commas."""
    return ", ".join(
        _names(feature, f"{before}{name}/") if hasattr(feature, "items") else before + name
        for name, feature in features.items()
    )


def _get(values: Any, name: str) -> Any:
    return functools.reduce(operator.getitem, name.split("/"), values)


def _frames(value: Any, where: str) -> np.ndarray:
    frames = np.asarray(value)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (1, 3):
        raise ValueError(
            f"{where}: {frames.dtype} {frames.shape}: expected uint8 (T, H, W, 1 or 3)"
        )
    return np.broadcast_to(frames, (*frames.shape[:3], 3))


def _texts(value: Any, feature: Any) -> list[str]:
    if hasattr(feature, "int2str") and hasattr(feature, "names"):
        return [feature.int2str(int(value))]
    values = [value] if isinstance(value, bytes | str) else list(np.ravel(value))
    return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values]
