"""A causal tokenizer of 64,000 codes goes the whole way: imported, preprocess, DiT, samples."""

import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from opensora_jax import main as main_command
from opensora_jax import sample
from opensora_jax.data import dataset, moving_shapes, video_io
from opensora_jax.inference.generator import DiTDescription, Generator
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.tokenizer import WindowEncoder, decode, fingerprint, load_tokenizer
from opensora_jax.preprocessing.options import Options, PreprocessError
from opensora_jax.stages.preprocess import preprocess
from opensora_jax.stages.preprocess_buckets import preprocess_buckets

ROOT = Path(__file__).parents[2]
TRAINING = (
    *(
        "dit.size=",
        "dit.depth=1",
        "dit.width=32",
        "dit.heads=1",
        "dit.patch=1",
        "dit.n_latent_frames=0",
    ),
    *("dit.batch_size=8", "dit.steps=2", "dit.eval_every=2", "dit.checkpoint_every=2"),
    *("sample.steps=1", "sample.prompts=('a red circle',)", "dit.validation_share=0.0"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos of 20 frames of 16 x 24, captions, a text model and the imported tokenizer."""
    folder = tmp_path_factory.mktemp("causal")
    published = folder / "Cosmos-Tokenizer-DV4x8x8"
    with tarfile.open(ROOT / "tests" / "golden" / "cosmos_dv4x8x8.tar.xz") as archive:
        archive.extractall(published, filter="data")
    (folder / "videos").mkdir()
    entries = []
    for i in range(4):
        video = moving_shapes.render(np.random.default_rng(i), "red", "circle", "up", 20, 24)
        video_io.write_video(folder / "videos" / f"{i}.mp4", video[:, :16], 8)
        entries.append({"file": f"{i}.mp4", "captions": ["a red circle"]})
    (folder / "captions.json").write_text(json.dumps(entries))
    make_small_text_model(folder / "text", ["a red circle"])
    script = ROOT / "data_prep" / "import_cosmos.py"
    command = [sys.executable, script, "-i", published, "-o", folder / "cosmos"]
    for said in ("written", "done already"):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        assert done.stdout.endswith(f"{folder / 'cosmos'}: {said}\n")
    return folder


def make(world, output, **options):
    models = {"vqvae": world / "cosmos", "text_model": world / "text"}
    options = Options(**models, **{"resolution": (16, 24), **options})
    preprocess(world / "captions.json", world / "videos", output, options)
    return dataset.open_dataset(output)


def test_an_imported_folder_is_the_published_one(world):
    published = load_tokenizer(world / "Cosmos-Tokenizer-DV4x8x8")
    imported = load_tokenizer(world / "cosmos")
    assert imported.config == published.config
    assert fingerprint(imported) == fingerprint(published)


@pytest.mark.parametrize(("n_frames", "n_latents"), [(17, 5), (1, 1)])
def test_from_videos_and_images_to_samples(world, tmp_path, n_frames, n_latents, capsys):
    """17 frames, and images, which are videos of one."""
    data = make(world, tmp_path / "dataset", n_frames=n_frames)
    assert data[0]["video_latent_states"].shape == (n_latents, 2, 3)
    assert data.window_latents == n_latents
    assert data.metadata["causal"] is True
    assert data.metadata["levels"] == [8, 8, 8, 5, 5, 5]
    argv = [f"--workdir={tmp_path}", f"--config={ROOT / 'configs' / 'msrvtt.py'}"]
    main_command.main([*argv, *(f"--config.{field}" for field in TRAINING)])
    model = json.loads((tmp_path / "dit" / "model.json").read_text())
    assert "latent_table" not in model
    assert len(json.dumps(model)) < 5000
    table = DiTDescription.read(tmp_path / "dit").latents.table
    assert table.shape == (64_000, 6)
    for size in ([], [f"--frames={n_frames}"]):
        sample.main(
            [f"--workdir={tmp_path}", "--prompt=a red circle", f"--output={tmp_path}/a.mp4", *size]
        )
        assert video_io.read_video(tmp_path / "a.mp4").shape == (n_frames, 16, 24, 3)
    # Of windows of one frame any number fits, but none beyond those of the training.
    told = r"^frames=16: expected 1 and a multiple of 4" if n_frames > 1 else "up to 1 frames"
    with pytest.raises(ValueError, match=told):
        Generator.load(tmp_path / "dit").latent_grid(16)
    # Begun again, it is the same model; with another table it is refused.
    main_command.main([*argv, *(f"--config.{field}" for field in TRAINING)])
    np.save(tmp_path / "dit" / "latents.npy", table + 1)
    with pytest.raises(ValueError, match=r"latents\.npy: not the embeddings of model\.json"):
        DiTDescription.read(tmp_path / "dit")


@pytest.mark.slow
def test_images_and_videos_in_buckets_of_one_window(world, tmp_path):
    """What is shorter than a window is encoded by itself: the codes are those of its begin."""
    image = video_io.read_video(world / "videos" / "0.mp4")[0]
    iio.imwrite(world / "videos" / "still.png", image)
    entries = [{"file": name, "captions": ["a red circle"]} for name in ("0.mp4", "still.png")]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    options = Options(vqvae=world / "cosmos", text_model=world / "text")
    buckets = ("17x16x24", "1x16x24")
    paths = (tmp_path / "captions.json", world / "videos", tmp_path / "out")
    preprocess_buckets(*paths, options, asked=",".join(buckets))
    video, still = (dataset.open_dataset(tmp_path / "out" / name) for name in buckets)
    assert (video.windows, video.grid) == (still.windows, still.grid)
    codes = still[0]["video_latent_states"]
    assert codes.shape == (1, 2, 3)
    model = load_tokenizer(world / "cosmos")
    encoder = WindowEncoder(model, 17, 1)
    encoder.add(np.repeat(image[None], 17, axis=0))
    np.testing.assert_array_equal(encoder.finish()[0][:1], codes)
    assert decode(model, codes[None], 17).shape == (1, 1, 16, 24, 3)


def test_longer_videos_in_windows_of_their_own(world, tmp_path):
    data = make(world, tmp_path / "dataset")  # 20 frames: one window, and of the rest one frame
    codes = data[0]["video_latent_states"]
    assert len(codes) == 6
    model = load_tokenizer(world / "cosmos")
    assert decode(model, codes[None], 17).shape == (1, 18, 16, 24, 3)
    encoder = WindowEncoder(model, 17, 1)
    video = video_io.read_video(world / "videos" / "0.mp4")
    encoder.add(video[17:18])  # alone, it is as it was behind the window
    np.testing.assert_array_equal(encoder.finish()[0], codes[5:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frames": 16}, "n_frames=16: expected 1 and a multiple of 4"),
        ({"n_frames": 20}, "n_frames=20: expected 1 and a multiple of 4 .* such as 18 or 22"),
        ({"window": 16}, "window=16: expected 1 and a multiple of 4"),
        ({"resolution": 20}, "resolution=20x20: expected multiples"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(world, tmp_path, options, message):
    with pytest.raises(PreprocessError, match=message):
        make(world, tmp_path / "dataset", **options)
    assert not (tmp_path / "dataset").exists()


def test_a_command_that_needs_the_factors(world, tmp_path):
    source = tmp_path / "nameless"
    (world / "Cosmos-Tokenizer-DV4x8x8").rename(source)
    try:
        command = runpy.run_path(str(ROOT / "data_prep" / "import_cosmos.py"))
        argv = ["import_cosmos.py", "-i", str(source), "-o", str(tmp_path / "out")]
        sys.argv, before = argv, sys.argv
        try:
            with pytest.raises(ValueError, match="weights do not tell the downsampling"):
                command["main"]()
            sys.argv = [*argv, "--downsample", "4", "8", "8"]
            command["main"]()
        finally:
            sys.argv = before
        assert fingerprint(load_tokenizer(tmp_path / "out")) == fingerprint(
            load_tokenizer(world / "cosmos")
        )
    finally:
        source.rename(world / "Cosmos-Tokenizer-DV4x8x8")
