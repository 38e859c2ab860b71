"""VideoGPT checkpoints give VideoGPT's numbers, at every downsampling and shape."""

from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
import videogpt_reference as reference
from flax import nnx
from torch_writer import Name, New, Writer, save, save_pickle

from opensora_jax.convert import torch_file
from opensora_jax.convert.videogpt import load_videogpt
from opensora_jax.models.codebook import perplexity

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "videogpt_stride4x4x4.ckpt"
RNG = np.random.default_rng(0)


def run(model, video):
    """(latents, codes, decoded codes, losses), compiled at once and with little optimization."""
    graph, state = nnx.split(model)

    def outputs(state, video):
        model = nnx.merge(graph, state)
        codes = model.encode(video)
        return model.latents(video), codes, model.decode(codes), model.losses(video)

    return jax.jit(outputs, compiler_options={"xla_backend_optimization_level": 0})(state, video)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "videogpt_stride4x4x4.npz"))


@pytest.fixture(scope="module")
def model():
    return load_videogpt(CHECKPOINT)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vqvae.ckpt"


def test_same_function_as_the_original(model, golden):
    latents, codes, recon, losses = run(model, golden["video"])
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, golden["codes"])
    np.testing.assert_allclose(latents, golden["pre_vq"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(recon, golden["recon"], atol=1e-4, rtol=0)
    for name in ("recon_loss", "commitment_loss"):
        np.testing.assert_allclose(losses[name], golden[name], rtol=1e-4)
    np.testing.assert_allclose(perplexity(codes, 64)[0], golden["perplexity"], rtol=1e-4)
    assert model.codebook.shape == (64, 16)
    assert (model.downsample, model.n_frames) == ((4, 4, 4), 8)


def test_the_reference_is_the_original(golden):
    """What the other downsamplings are compared with agrees with the original itself."""
    tensors = torch_file.load(CHECKPOINT)["state_dict"]
    z = reference.pre_vq(tensors, golden["video"], (4, 4, 4))
    np.testing.assert_allclose(z, golden["pre_vq"], atol=1e-4, rtol=0)
    codes = reference.nearest(tensors, z)
    np.testing.assert_array_equal(codes, golden["codes"])
    recon = reference.decode(tensors, codes, (4, 4, 4))
    np.testing.assert_allclose(recon, golden["recon"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("downsample", "shape"),
    [
        ((4, 2, 2), (2, 8, 6, 10)),
        ((2, 4, 4), (1, 6, 8, 12)),
        ((2, 1, 4), (1, 4, 3, 8)),
    ],
)
def test_other_downsamplings_and_shapes(path, downsample, shape):
    tensors = reference.random_state_dict(downsample)
    save(path, tensors)
    model = load_videogpt(path, downsample=downsample)
    video = RNG.uniform(-0.5, 0.5, (*shape, 3)).astype(np.float32)
    z = reference.pre_vq(tensors, video, downsample)
    latents, codes, recon, _ = run(model, video)
    np.testing.assert_allclose(latents, z, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(codes, reference.nearest(tensors, z))
    expected = reference.decode(tensors, np.asarray(codes), downsample)
    assert recon.shape == video.shape
    np.testing.assert_allclose(recon, expected, atol=1e-4, rtol=0)


SETTINGS = {"downsample": (2, 2, 2), "n_hiddens": 8, "sequence_length": 4, "resolution": 8}


@pytest.mark.parametrize(
    "hyper_parameters",
    [
        {"hyper_parameters": {"args": New("argparse.Namespace", SETTINGS)}},
        {"hyper_parameters": New("argparse.Namespace", SETTINGS)},
        {"hyper_parameters": {**SETTINGS, "downsample": [2, 2, 2]}},
        {"hparams": SETTINGS},
    ],
)
def test_hyper_parameters_of_every_age(path, hyper_parameters):
    tensors = reference.random_state_dict((2, 2, 2))
    callbacks = {Name("pytorch_lightning.callbacks.ModelCheckpoint"): {"best": 0.5}}
    save(path, {"callbacks": callbacks, "state_dict": OrderedDict(tensors), **hyper_parameters})
    model = load_videogpt(path)
    assert (model.downsample, model.n_frames) == ((2, 2, 2), 4)
    np.testing.assert_array_equal(model.codebook, tensors["codebook.embeddings"])


def test_hyper_parameters_in_a_lost_dict_class(path):
    tensors = reference.random_state_dict((2, 2, 2))
    writer = Writer()
    dump = writer.dump
    lost = dump(Name("pytorch_lightning.utilities.parsing.AttributeDict")) + b")\x81("
    lost += b"".join(dump(key) + dump(value) for key, value in SETTINGS.items()) + b"u"
    start = b"\x80\x02}(" + dump("state_dict") + dump(tensors)
    save_pickle(path, start + dump("hyper_parameters") + lost + b"u.", writer.storages)
    assert load_videogpt(path).downsample == (2, 2, 2)


def test_ready_to_train_on(model):
    """The codebook counts as initialized, and the model is in evaluation mode."""
    assert bool(model.codebook_state.is_initialized[...])
    assert model.encoder_stack.norm.use_running_average
    assert model.decoder_stack.blocks[1].norms[2].use_running_average


def test_downsample_must_be_known_and_fit(path):
    tensors = reference.random_state_dict((2, 2, 2))
    save(path, tensors)
    with pytest.raises(ValueError, match=r"vqvae\.ckpt: .*give downsample"):
        load_videogpt(path)
    for downsample in [(4, 4, 4), (1, 1, 1), (2, 2), (2, 2, 0), "222", (2, 2, 2.0)]:
        with pytest.raises(ValueError, match=r"vqvae\.ckpt: downsample="):
            load_videogpt(path, downsample=downsample)


def test_wrong_weights_are_named(path):
    tensors = reference.random_state_dict((2, 2, 2))
    del tensors["decoder.res_stack.0.block.8.attn_h.fc.bias"]
    tensors["encoder.res_stack.0.block.8.attn_x.fc.bias"] = np.zeros(8, np.float32)
    tensors["pre_vq_conv.conv.weight"] = np.zeros((5, 8, 1, 1, 1), np.float32)
    save(path, tensors)
    with pytest.raises(ValueError, match="weights do not fit") as error:
        load_videogpt(path, downsample=(2, 2, 2))
    message = str(error.value)
    assert "missing 'decoder.res_stack.0.block.8.attn_h.fc.bias' (8,)" in message
    assert "unexpected 'encoder.res_stack.0.block.8.attn_x.fc.bias'" in message
    assert (
        "'pre_vq_conv.conv.weight' has shape (5, 8, 1, 1, 1), expected (6, 8, 1, 1, 1)" in message
    )
    assert message.count(";") == 2  # and nothing else


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1], "holds a list"),
        ({"state_dict": {"weight": np.zeros(2, np.float32)}}, "no codebook.embeddings"),
        ({"codebook.embeddings": np.zeros((2, 2), np.float32)}, "encoder.conv_last"),
        ({"codebook.embeddings": np.zeros(2, np.float32)}, r"\(2,\), expected 2 axes"),
        ({"codebook.embeddings": 3}, "is a int, expected only tensors"),
    ],
)
def test_other_files_are_refused(path, content, match):
    save(path, content)
    with pytest.raises(ValueError, match=match):
        load_videogpt(path, downsample=(2, 2, 2))
