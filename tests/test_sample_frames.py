"""Samples around frames that are given, and longer than the training: models of random weights."""

import tarfile
from pathlib import Path

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from test_sample import error_of, write_dit

from opensora_jax import mesh as mesh_lib
from opensora_jax import sample
from opensora_jax.data import moving_shapes, video_io
from opensora_jax.diffusion.on_embeddings import RectifiedFlow
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.inference.frames import Canvas, Given
from opensora_jax.inference.generator import DiTDescription, Generator
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.models.dit import DiTConfig
from opensora_jax.tasks.dit import Latents

GOLDEN = Path(__file__).parent / "golden"
HOW = {"sampling": Sampling(2, 2.0), "seed": 1}
# By the golden tokenizer: windows of 8 frames, two latents.
N_FRAMES, SIDE = 8, 16


def render(seed, n_frames=N_FRAMES):
    rng = np.random.default_rng(seed)
    return moving_shapes.render(rng, "red", "circle", "up", n_frames, SIDE)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return write_dit(folder, {"sample": {"steps": 2, "guidance": 2.0}}, conditioning="frames")


@pytest.fixture(scope="module")
def model(workdir):
    """(generator, how to draw)."""
    generator = Generator.load(workdir / "dit")
    return generator, HOW | {"params": generator.restore(workdir / "dit")}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    video_io.write_video(folder / "video.mp4", render(0), 8)
    video_io.write_video(folder / "short.mp4", render(0, 3), 8)
    iio.imwrite(folder / "image.png", render(0)[0].repeat(2, axis=1))
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.mark.parametrize(
    ("init", "more", "n_frames"),
    [("--init_video={}/video.mp4", ["--keep=last"], 8), ("--init_image={}/image.png", [], 12)],
)
def test_the_command(workdir, videos, tmp_path, init, more, n_frames):
    output = tmp_path / "out.mp4"
    more = [*more, f"--frames={n_frames}"]
    argv = [f"--workdir={workdir}", "--prompt=a red circle", f"--output={output}"]
    sample.main([*argv, init.format(videos), *more])
    info = video_io.probe(output)
    assert (info.n_frames, info.height, info.width) == (n_frames, SIDE, SIDE)
    before = output.read_bytes()
    sample.main([*argv, *more[1:]])
    assert output.read_bytes() != before


def test_windows_follow_what_is_given_and_each_other(model):
    generator, how = model
    prompts = ["a red circle", "a circle"]
    shape = (2, N_FRAMES, SIDE, SIDE, 3)
    given = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)

    def draw(n_frames, videos=given, kept="first", n=1):
        canvas = Canvas(generator, n_frames)
        canvas.keep(Given("a.mp4", videos, kept, n))
        drawn = canvas.draw(prompts, **how)
        assert drawn.shape == (2, n_frames, SIDE, SIDE, 3)
        return drawn

    one = draw(8)
    long = draw(20)
    np.testing.assert_array_equal(long[:, :8], one)
    # The second window sees the end of the first, and that it stands still from there on.
    context = np.concatenate([one[:, 4:], one[:, -1:].repeat(4, axis=1)], axis=1)
    known = generator.encode(context), np.array([True, False])
    expected = generator.sample(prompts, known=known, part=1, **how)[:, 4:]
    np.testing.assert_array_equal(long[:, 8:12], expected)
    same = draw(8, videos=given[:1])  # for both
    np.testing.assert_array_equal(same[0], one[0])
    assert (same[1] != one[1]).any()
    # Backward from the end, where the last window is the first that is drawn.
    np.testing.assert_array_equal(draw(20, kept="last")[:, -8:], draw(8, kept="last"))
    # Whole windows that are given are the tokenizer's reconstruction.
    whole = draw(16, n=2)
    expected = generator.sample(
        prompts, known=(generator.encode(given), np.array([True, True])), **how
    )
    np.testing.assert_array_equal(whole[:, :8], expected)
    assert (whole[:, :8] != one).any()
    # Nothing that is given: longer all the same.
    plain = Canvas(generator, 12).draw(prompts, **how)
    np.testing.assert_array_equal(plain[:, :8], generator.sample(prompts, **how))


def test_many_devices_draw_the_same(workdir):
    codes = np.random.default_rng(0).integers(64, size=(3, 2, 4, 4)).astype(np.int32)
    drawn = []
    for n in (1, 8):
        sizes = {"data": 1, "fsdp": n, "context": 1, "tensor": 1}
        mesh = mesh_lib.make_mesh(sizes, jax.devices()[:n])
        generator = Generator(DiTDescription.read(workdir / "dit"), mesh=mesh)
        how = HOW | {"params": generator.restore(workdir / "dit")}
        drawn.append(
            generator.sample(["a", "red", "circle"], known=(codes, np.array([1, 0], bool)), **how)
        )
    np.testing.assert_array_equal(*drawn)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """As `model`, by a causal tokenizer: 17 frames are five latents, the first of one frame."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = folder / "Cosmos-Tokenizer-DV4x8x8"
    with tarfile.open(GOLDEN / "cosmos_dv4x8x8.tar.xz") as archive:
        archive.extractall(tokenizer, filter="data")
    make_small_text_model(folder / "text", ["a red circle"], width=16, depth=1, heads=1)
    sizes = {"depth": 1, "width": 16, "heads": 1, "channels": 6, "out_channels": 6, "patch": 1}
    description = DiTDescription(
        dit=DiTConfig(**sizes, text_width=16, conditioning="frames"),
        objective=RectifiedFlow(),
        latents=Latents(np.random.default_rng(0).normal(size=(64_000, 6)).astype(np.float32)),
        latent_grid=(5, 2, 2),
        text_length=8,
        vqvae=str(tokenizer),
        text_model=str(folder / "text"),
        fps=8.0,
        downsample=(4, 8, 8),
        window=17,
        causal=True,
    )
    description.record(folder / "dit")
    assert DiTDescription.read(folder / "dit").dit == description.dit
    generator = Generator(description)
    params, _ = generator.task.init(jax.random.key(0))
    return generator, HOW | {"params": params}


def test_an_image_is_the_first_latent_of_a_causal_tokenizer(causal):
    generator, how = causal
    image = render(0, 17)[:1]
    canvas = Canvas(generator, 21)
    canvas.keep(Given("a.png", image[None], "first", 1, is_image=True))
    assert canvas.kept.nonzero()[0].tolist() == [0]
    video = canvas.draw(["a red circle"], **how)
    assert video.shape == (1, 21, SIDE, SIDE, 3)
    alone = generator.encode(image[None])
    known = np.zeros((1, 5, 2, 2), np.int32)
    known[:, :1] = alone
    expected = generator.sample(["a red circle"], known=(known, np.arange(5) == 0), **how)
    np.testing.assert_array_equal(video[:, :17], expected)


@pytest.mark.parametrize(
    ("kept", "n_frames", "expected"),
    [
        ("first:2", 21, range(5)),
        ("last:2", 17, range(9, 17)),
        ("last:1", 25, range(21, 25)),
        ("ends:1", 21, [0, 17, 18, 19, 20]),
        ("every:2", 17, [0, *range(5, 9), *range(13, 17)]),
    ],
)
def test_frames_that_are_kept_of_a_causal_tokenizer(causal, kept, n_frames, expected):
    generator, _ = causal
    canvas = Canvas(generator, n_frames)
    kept, n = kept.split(":")
    canvas.keep(Given("a.mp4", render(0, 25)[None], kept, int(n)))
    assert canvas.kept.nonzero()[0].tolist() == list(expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--keep=first"], "--keep: expected --init_video or --init_image beside it"),
        (["--init_video=a.mp4", "--init_image=a.png"], "expected no --init_video beside it"),
        (["--init_video=nowhere.mp4"], "--init_video=nowhere.mp4: no such file"),
        *[
            (["--init_video=a.mp4", f"--keep={keep}"], f"--keep: {keep}: expected first, last")
            for keep in ("middle", "first:0", "every", "every:1", "first:x", "last:")
        ],
        (["--init_video={}/text.mp4"], "text.mp4: cannot be read as a video"),
        (["--init_video={}/video.mp4", "--keep=first:2"], "all of the 2 latent frames"),
        (["--init_video={}/short.mp4"], "short.mp4: 3 frames at the model's rate: expected at lea"),
        (["--init_image={}/image.png", "--frames=13"], "frames=13: expected 8 or more, such as 12"),
        (["--frames=2"], "frames=2: expected a multiple of 4"),
    ],
)
def test_mistakes_are_told(workdir, videos, tmp_path, capsys, argv, message):
    start = [f"--workdir={workdir}", "--prompt=a", f"--output={tmp_path / 'out.mp4'}"]
    assert message in error_of(capsys, *start, *(word.format(videos) for word in argv))
    assert not list(tmp_path.iterdir())


def test_a_model_of_text_alone(videos, tmp_path, capsys):
    workdir = write_dit(tmp_path, {})
    assert "conditioning" not in DiTDescription.read(workdir / "dit").to_json()["dit"]
    argv = [f"--workdir={workdir}", "--prompt=a", f"--output={tmp_path / 'out.mp4'}"]
    message = error_of(capsys, *argv, f"--init_image={videos / 'image.png'}")
    assert "dit.conditioning=text: this model was not trained to be told frames" in message
