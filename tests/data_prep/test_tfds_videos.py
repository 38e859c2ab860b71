"""Any TFDS dataset of videos and texts as the input of preprocessing."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as library
from PIL import Image

from opensora_jax.data import dataset, video_io
from opensora_jax.data.tfds_videos import write_videos

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "stages"))
LENGTHS = (5, 8, 4, 6)


def png(image_HWC):
    written = io.BytesIO()
    Image.fromarray(image_HWC).save(written, "png")
    written.seek(0)
    return written


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (n, 17, 20, 3), np.uint8) for n in LENGTHS]


@pytest.fixture(scope="module")
def prepared(videos, tmp_path_factory):
    """The folder of a dataset as somebody else would prepare it."""
    features = library.features

    class Clips(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version("1.0.0")
        code_path = None

        def _info(self):
            kinds = {
                "clip": features.Sequence(features.Image(shape=(17, 20, 3), encoding_format="png")),
                "about": {"text": features.Text(), "texts": features.Sequence(features.Text())},
                "label": features.ClassLabel(names=["walk", "run"]),
            }
            return library.core.DatasetInfo(
                builder=self, features=features.FeaturesDict(kinds), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, video in enumerate(videos):
                about = {"text": f"clip {i}", "texts": [f"clip {i}", f"number {i}"]}
                yield i, {"clip": list(map(png, video)), "about": about, "label": i % 2}

    builder = Clips(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    # As TFDS describes what was declared as a Video, for which it needs TensorFlow.
    path = builder.data_path / "features.json"
    described = json.loads(path.read_text())
    shape = {"dimensions": ["-1", "17", "20", "3"]}
    described["featuresDict"]["features"]["clip"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {"shape": shape, "dtype": "uint8", "encodingFormat": "png"},
    }
    path.write_text(json.dumps(described))
    return builder.data_path


def written(prepared, folder, **changes):
    options = {"video": "clip", "text": "about/text", "split": "train", "fps": 5.0}
    return write_videos(str(prepared), folder, **options | changes)


def test_frames_are_the_same_to_the_pixel_and_texts_go_with_them(prepared, videos, tmp_path):
    captions, folder = written(prepared, tmp_path / "one")
    entries = json.loads(captions.read_text())
    assert [entry["captions"] for entry in entries] == [[f"clip {i}"] for i in range(4)]
    for entry, video in zip(entries, videos, strict=True):
        np.testing.assert_array_equal(video_io.read_video(folder / entry["file"]), video)
        assert video_io.probe(folder / entry["file"]).fps == 5.0
    several, _ = written(prepared, tmp_path / "several", text="about/texts")
    assert json.loads(several.read_text())[2]["captions"] == ["clip 2", "number 2"]
    classes, _ = written(prepared, tmp_path / "classes", text="label")
    found = [entry["captions"] for entry in json.loads(classes.read_text())]
    assert found == [["walk"], ["run"], ["walk"], ["run"]]


def test_interrupted_it_goes_on_and_done_it_stays(prepared, tmp_path):
    captions, folder = written(prepared, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    captions.unlink()
    gone = folder / "00000002.mkv"
    gone.unlink()
    written(prepared, tmp_path)
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before.keys() == after.keys()
    assert {path for path in before if before[path] != after[path]} == {gone}
    with pytest.raises(ValueError, match=r"made with other settings: fps=6\.0, there 5\.0"):
        written(prepared, tmp_path, fps=6.0)


def test_what_is_not_there_is_named(prepared, tmp_path):
    with pytest.raises(
        ValueError, match=r"--tfds=no_such_set: cannot be read: .*expected the name"
    ):
        write_videos("no_such_set", tmp_path, video="v", text="t", split="train", fps=8.0)
    names = "clip, about/text, about/texts, label"
    for change, message in [
        ({"video": "video"}, "--tfds_video=video: no such feature"),
        ({"text": "about/caption"}, "--tfds_text=about/caption: no such feature"),
        ({"text": "label/x"}, "--tfds_text=label/x: no such feature"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            written(prepared, tmp_path, **change)
        assert all(name in str(raised.value) for name in names.split(", "))
    with pytest.raises(ValueError, match=r"cannot be read: .*test"):
        written(prepared, tmp_path, split="test")
    with pytest.raises(ValueError, match=r"label: .*: expected uint8 \(T, H, W, 1 or 3\)"):
        written(prepared, tmp_path / "label", video="label")


def command(*words):
    return subprocess.run(
        [sys.executable, ROOT / "data_prep/preprocess_data.py", *map(str, words)],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_command_makes_a_dataset_of_it(prepared, videos, tmp_path):
    from made_world import save_vqvae

    from opensora_jax.inference.small_text_model import make_small_text_model

    save_vqvae(tmp_path / "vqvae")
    make_small_text_model(tmp_path / "text_model", ["clip number"])
    models = ["--vqvae", tmp_path / "vqvae", "--text_model", tmp_path / "text_model"]
    rest = [*models, "--resolution", 16, "--window", 8, "--fps", 0]
    of_tfds = ["--tfds", prepared, "--tfds_video", "clip", "--tfds_text", "about/texts"]
    done = command(*of_tfds, "-o", tmp_path / "made", *rest)
    assert done.returncode == 0, done.stderr
    found = dataset.open_dataset(tmp_path / "made")
    assert len(found) == 8
    assert [found.column(i, "caption") for i in (0, 1, 7)] == ["clip 0", "number 0", "number 3"]
    refused = command("--tfds", "x", "-c", "y", "-o", tmp_path / "x", *models)
    assert refused.returncode == 2
    assert "expected --captions and --videos, or --tfds" in refused.stderr
