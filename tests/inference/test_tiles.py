"""Tiles give what the whole gives, wherever a cell sees no further than its tile."""

from pathlib import Path

import numpy as np
import pytest

from opensora_jax.data import moving_shapes
from opensora_jax.inference.tiles import Tiles
from opensora_jax.inference.tokenizer import WindowEncoder, decode, load_tokenizer
from opensora_jax.metrics import pixel

VQVAE = Path(__file__).parents[1] / "golden" / "videogpt_stride4x4x4.ckpt"


@pytest.mark.parametrize("cells", [(4, 4), (5, 9), (16, 7), (3, 30)])
@pytest.mark.parametrize("pixels", [8, 16, 20, 64, None])
def test_what_is_local_is_the_same(cells, pixels):
    tiles = Tiles.of(cells, (4, 2), pixels)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (2, 3, 4 * cells[0], 2 * cells[1], 3), np.uint8)
    shapes = set()

    def encode(piece):
        shapes.add(piece.shape)
        return piece[:, :, ::4, ::2, 0].astype(np.int32)

    codes = tiles.encode(encode, video, (4, 2))
    np.testing.assert_array_equal(codes, video[:, :, ::4, ::2, 0])

    def decode_tile(codes):
        return np.repeat(np.repeat(codes, 4, 2), 2, 3)[..., None].repeat(3, -1).astype(np.uint8)

    decoded = tiles.decode(decode_tile, codes, (4, 2))
    np.testing.assert_array_equal(decoded, decode_tile(codes))
    assert len(shapes) == 1  # one compilation
    if pixels:
        assert max(shapes)[2] <= pixels


@pytest.mark.parametrize("pixels", [6, 4, 0])
def test_tiles_that_do_not_fit(pixels):
    with pytest.raises(ValueError, match=f"^tile={pixels}: expected a multiple of 4 and 4, of two"):
        Tiles.of((8, 8), (4, 4), pixels)


def test_a_tokenizer_in_tiles_is_nearly_the_whole():
    model = load_tokenizer(VQVAE)
    video = moving_shapes.render(np.random.default_rng(0), "red", "circle", "up", 8, 96)
    found = {}
    for tile in (None, 48):
        encoder = WindowEncoder(model, 8, 1, tile)
        encoder.add(video)
        (codes,) = encoder.finish()
        found[tile] = codes, decode(model, codes[None], 8, tile)[0]
    assert found[48][0].shape == found[None][0].shape
    assert found[48][1].shape == found[None][1].shape == video.shape
    assert (found[48][0] == found[None][0]).mean() > 0.75
    assert pixel.psnr(found[48][1], found[None][1]) > 28
