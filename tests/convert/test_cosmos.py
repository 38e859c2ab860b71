"""Archives of Cosmos-Tokenizer give its numbers, for videos, images, and sides that differ."""

import io
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from torch_writer import Call, New, save, save_pickle

from opensora_jax.convert import cosmos, table, torch_file
from opensora_jax.convert.cosmos import load_cosmos
from opensora_jax.models.cosmos import Cosmos, CosmosConfig

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = CosmosConfig((2, 4, 4), channels=2, multipliers=(1, 2), n_res_blocks=1, patch=2, n_frames=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosmos") / "Cosmos-Tokenizer-DV4x8x8"
    with tarfile.open(GOLDEN / "cosmos_dv4x8x8.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def halves(folder):
    """As most have it: the encoder and the decoder."""
    halves = folder.parent / "halves" / folder.name
    halves.mkdir(parents=True)
    for name in ("encoder.jit", "decoder.jit"):
        shutil.copy(folder / name, halves)
    return halves


@pytest.fixture(scope="module")
def model(halves):
    return load_cosmos(halves)


def run(model, video):
    """(latents, codes, reconstruction), compiled at once and with little optimization."""
    graph, state = nnx.split(model)

    def outputs(state, video):
        model = nnx.merge(graph, state)
        codes = model.encode(video)
        return model.latents(video), codes, model.decode(codes)

    return jax.jit(outputs, compiler_options={"xla_backend_optimization_level": 0})(state, video)


# 9 frames of 32 x 48, two images, 17 frames of 24 x 40.
@pytest.mark.parametrize("case", ["", "_1", pytest.param("_2", marks=pytest.mark.slow)])
def test_same_function_as_the_original(model, case):
    golden = np.load(GOLDEN / "cosmos_dv4x8x8.npz")
    latents, codes, recon = run(model, golden[f"video{case}"] / 2)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, golden[f"indices{case}"])
    np.testing.assert_allclose(latents, golden[f"pre_quant{case}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(2 * recon, golden[f"recon{case}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(model.codebook[codes], golden[f"codes{case}"], atol=1e-6)


def weights(model):
    return jax.tree.leaves(nnx.state(model))


def assert_same(a, b):
    assert a.config == b.config
    for x, y in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_whole_archive_is_its_halves(folder, model):
    assert_same(load_cosmos(folder), model)
    shutil.copy(folder / "autoencoder.jit", folder.parent / "renamed.jit")
    assert_same(load_cosmos(folder.parent / "renamed.jit", (4, 8, 8)), model)


def test_what_the_model_says(model):
    assert (model.downsample, model.causal, model.n_frames) == ((4, 8, 8), True, 17)
    assert model.codebook.shape == (64_000, 6)
    assert model.config.levels == (8, 8, 8, 5, 5, 5)


def tensors_of(model):
    """The state_dict of a model of ours, by the names of the original."""
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        (name,), _, _, axes = table._origin(".".join(map(str, path)), variable.shape, cosmos.NAMES)
        x = np.asarray(variable[...])
        tensors[name] = np.ascontiguousarray(x if axes is None else x.transpose(np.argsort(axes)))
    return tensors


@pytest.fixture(scope="module")
def small():
    return Cosmos(SMALL, rngs=nnx.Rngs(0))


def test_state_dicts(small, tmp_path):
    tensors = tensors_of(small)
    save(tmp_path / "a.pt", OrderedDict(tensors))
    save(tmp_path / "b.pt", {"state_dict": tensors, "epoch": 3})
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    for path in (tmp_path / "a.pt", tmp_path / "b.pt", tmp_path):
        assert_same(load_cosmos(path, (2, 4, 4), n_frames=9), small)


def test_bfloat16_weights_are_computed_with_in_float32(small, tmp_path):
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors_of(small).items()}
    save(tmp_path / "a.pt", tensors)
    loaded = load_cosmos(tmp_path / "a.pt", (2, 4, 4))
    assert {x.dtype for x in weights(loaded)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "config",
    [
        CosmosConfig((8, 8, 8), channels=2, multipliers=(1, 2, 2), n_res_blocks=1),
        CosmosConfig((8, 16, 16), channels=2, multipliers=(1, 2, 2), n_res_blocks=1),
        CosmosConfig((4, 8, 8), channels=2, multipliers=(2, 1, 3), n_res_blocks=2, patch=2),
        CosmosConfig((1, 2, 2), channels=2, multipliers=(1, 2), n_res_blocks=1, patch=1),
        CosmosConfig((2, 4, 4), channels=2, multipliers=(1, 2), patch=2, attention_levels=(1,)),
        CosmosConfig((4, 4, 4), (5, 3), 2, (1,), 1, encoder_latents=7, decoder_latents=3),
    ],
    ids=lambda config: "x".join(map(str, config.downsample)),
)
def test_other_sizes(config, tmp_path):
    model = Cosmos(config, rngs=nnx.Rngs(0))
    tensors = tensors_of(model) | {"quantizer._levels": np.array(config.levels, np.int32)}
    save(tmp_path / "model.pt", tensors)
    loaded = load_cosmos(tmp_path, config.downsample)
    assert_same(loaded, model)
    t, h, w = config.downsample
    video = jax.ShapeDtypeStruct((1, 1 + 2 * t, 3 * h, 2 * w, 3), np.float32)
    codes = nnx.eval_shape(lambda m, v: m.encode(v), loaded, video)
    assert codes.shape == (1, 3, 3, 2)
    assert nnx.eval_shape(lambda m, c: m.decode(c), loaded, codes).shape == video.shape


def test_no_latent_sees_a_later_frame(small):
    video = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 5, 8, 8, 3)).astype(np.float32)
    encode = nnx.jit(lambda model, video: model.latents(video))
    whole = encode(small, video)
    for n in (1, 3):
        np.testing.assert_allclose(encode(small, video[:, :n]), whole[:, : n // 2 + 1], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 32, 32, 3), (1, 9, 32, 30, 3), (9, 32, 32, 3)])
def test_videos_that_do_not_fit(model, shape):
    with pytest.raises(ValueError, match=r"expected \(B, T, H, W, 3\) with T 1"):
        model.encode(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("downsample", "message"),
    [
        ((8, 8, 8), "but its name says .4, 8, 8."),
        ((4, 8), "expected three numbers"),
        ((4, 8, "8"), "expected three numbers"),
    ],
)
def test_contradictions(halves, downsample, message):
    with pytest.raises(ValueError, match=message):
        load_cosmos(halves, downsample)


@pytest.mark.parametrize(
    ("downsample", "message"),
    [
        (None, "weights do not tell the downsampling"),
        ((4, 32, 32), "not what patches of 4 and 3 levels can give"),
        ((2, 8, 8), "not what patches of 4"),
        ((8, 4, 4), "not what patches of 4"),
        ((4, 12, 12), "powers of two"),
        ((4, 8, 16), "height and width alike"),
    ],
)
def test_what_weights_cannot_tell(folder, downsample, message):
    path = folder.parent / "nameless.jit"
    shutil.copy(folder / "autoencoder.jit", path)
    with pytest.raises(ValueError, match=message) as error:
        load_cosmos(path, downsample)
    assert str(path) in str(error.value)


def test_half_a_tokenizer(halves, tmp_path):
    shutil.copy(halves / "encoder.jit", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no decoder\.jit"):
        load_cosmos(tmp_path, (4, 8, 8))
    with pytest.raises(ValueError, match=r"missing decoder\.conv_in"):
        load_cosmos(tmp_path / "encoder.jit", (4, 8, 8))
    with pytest.raises(FileNotFoundError):
        load_cosmos(tmp_path / "none.jit", (4, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("quant_conv.conv3d.weight"), "missing quant_conv.conv3d.weight"),
        (lambda t: t.pop("encoder.norm_out.norm.bias"), "missing 'encoder.norm_out.norm.bias'"),
        (lambda t: t.update(extra=np.zeros(3)), "unexpected 'extra'"),
        (lambda t: t.update({"quantizer._levels": np.array([8, 8])}), "latents of 6 dimensions"),
        (
            lambda t: t.update({"encoder.conv_in.0.conv3d.weight": np.zeros((2, 25, 1, 3, 3))}),
            "takes 25 channels",
        ),
    ],
)
def test_weights_that_do_not_fit(small, tmp_path, change, message):
    tensors = tensors_of(small)
    change(tensors)
    save(tmp_path / "model.pt", tensors)
    with pytest.raises(ValueError, match=message):
        load_cosmos(tmp_path, (2, 4, 4))


def test_nothing_of_a_malicious_archive_runs(tmp_path):
    marker = tmp_path / "ran"
    call = Call("os.system", (f"touch {marker}",))
    path = tmp_path / "autoencoder.jit"
    save(path, New("__torch__.Tokenizer", {"encoder": call}))
    with pytest.raises(torch_file.TorchFileError, match=r"refuses to call 'os\.system'"):
        load_cosmos(path, (4, 8, 8))
    assert not marker.exists()


def test_names_without_end_of_modules_in_modules(tmp_path):
    save(tmp_path / "a.jit", {"a" * 600: {"b" * 600: {"c" * 600: 1}}})
    with pytest.raises(ValueError, match="a name of 1200 characters"):
        load_cosmos(tmp_path / "a.jit", (4, 8, 8))


def test_modules_that_share_modules_without_end(tmp_path):
    # 2**30 values, each module holding the one before twice.
    pickled = io.BytesIO()
    pickled.write(b"\x80\x02}q\x00")
    for i in range(30):
        pickled.write(b"}(X\x01\x00\x00\x00ah" + bytes([i]) + b"X\x01\x00\x00\x00bh" + bytes([i]))
        pickled.write(b"uq" + bytes([i + 1]))
    pickled.write(b".")
    save_pickle(tmp_path / "a.jit", pickled.getvalue())
    with pytest.raises(ValueError, match="more than 100000 values"):
        load_cosmos(tmp_path / "a.jit", (4, 8, 8))


def test_archives_damaged_at_random_are_read_or_refused(folder, tmp_path):
    """Bytes of the pickle changed, the archive's checksums right again: 150 of them."""
    with zipfile.ZipFile(folder / "autoencoder.jit") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("/data.pkl"))
    rng, refusals = np.random.default_rng(0), []
    path = tmp_path / "a.jit"
    for i in range(150):
        pickled = bytearray(members[name])
        for place in rng.integers(len(pickled), size=1 + i % 4):
            pickled[place] = rng.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, bytes(pickled) if member == name else data)
        try:
            cosmos._contents(path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 30
    assert all(message.startswith(str(path)) for message in refusals)
