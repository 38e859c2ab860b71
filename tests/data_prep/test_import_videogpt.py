"""import_videogpt.py: the imported folder is the same model as the checkpoint."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from opensora_jax.data import dataset, moving_shapes
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.tokenizer import fingerprint, load_tokenizer, save_tokenizer
from opensora_jax.preprocessing.options import Options
from opensora_jax.stages.preprocess import preprocess

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT = GOLDEN / "videogpt_stride4x4x4.ckpt"


SCRIPT = ROOT / "data_prep" / "import_videogpt.py"
import_videogpt = runpy.run_path(str(SCRIPT))["import_videogpt"]


def run(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def files(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import") / "vqvae"
    done = run("-i", CHECKPOINT, "-o", folder)
    assert done.returncode == 0, done.stderr
    assert "downsample: (4, 4, 4)\n" in done.stdout
    assert done.stdout.endswith(f"{folder}: written\n")
    return folder


def test_same_codes_as_the_original(imported):
    golden = np.load(GOLDEN / "videogpt_stride4x4x4.npz")
    model = load_tokenizer(imported)
    codes = nnx.jit(type(model).encode)(model, golden["video"])
    np.testing.assert_array_equal(codes, golden["codes"])
    assert (model.downsample, model.n_frames) == ((4, 4, 4), 8)


def test_preprocessing_takes_it_for_the_same_model(imported, tmp_path):
    moving_shapes.write_dataset(
        tmp_path / "shapes",
        n_videos=2,
        combinations=moving_shapes.ALL,
        seed=0,
        n_frames=8,
        resolution=16,
        fps=8,
        n_captions=1,
    )
    make_small_text_model(tmp_path / "text", ["a red circle"])
    arguments = [tmp_path / "shapes" / "captions.json", tmp_path / "shapes" / "videos"]
    options = Options(vqvae=imported, text_model=tmp_path / "text", resolution=16)
    preprocess(*arguments, tmp_path / "dataset", options)
    found = dataset.open_dataset(tmp_path / "dataset")
    assert found.metadata["counts"]["kept"] == 2
    direct = load_tokenizer(CHECKPOINT)
    assert found.metadata["vqvae_fingerprint"] == fingerprint(direct)
    np.testing.assert_array_equal(found.codebook, direct.codebook)


def test_again_changes_nothing(imported):
    before = files(imported)
    model, is_new = import_videogpt(CHECKPOINT, imported)
    assert not is_new
    assert fingerprint(model) == fingerprint(load_tokenizer(imported))
    assert files(imported) == before


def test_an_interrupted_import_goes_on(imported, tmp_path):
    (tmp_path / "model.json").write_bytes((imported / "model.json").read_bytes())
    _, is_new = import_videogpt(CHECKPOINT, tmp_path)
    assert is_new
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(load_tokenizer(imported))


def test_a_folder_with_another_model_is_refused(imported):
    before = files(imported)
    done = run("-i", CHECKPOINT, "-o", imported, "--n_frames", 16)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {imported}: holds another model than {CHECKPOINT}")
    assert files(imported) == before


def test_the_same_sizes_with_other_weights_are_another_model(imported, tmp_path):
    changed = load_tokenizer(imported)
    changed.codebook_state.embeddings[...] = changed.codebook + 1
    save_tokenizer(tmp_path, changed)
    with pytest.raises(ValueError, match="holds another model"):
        import_videogpt(CHECKPOINT, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"downsample": (4, 8, 8)}, "downsample=(4, 8, 8), expected 2**2 as its largest factor"),
        ({"output": CHECKPOINT}, f"{CHECKPOINT}: a file, expected a folder"),
        ({"n_frames": 6}, "n_frames=6"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, arguments, message):
    arguments = {"checkpoint": CHECKPOINT, "output": tmp_path / "vqvae", **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        import_videogpt(**arguments)
    assert not (tmp_path / "vqvae").exists()
