"""The mesh, and the rule table that every parameter's axes go through."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from opensora_jax import mesh as mesh_lib
from opensora_jax.models.dit import TEXT_MODES, DiT
from opensora_jax.models.vqvae import VQVAE


def sizes(**given):
    return dict.fromkeys(mesh_lib.AXES, 1) | given


def models():
    for text_mode in TEXT_MODES:
        yield nnx.eval_shape(
            lambda text_mode=text_mode: DiT(
                depth=2, width=32, heads=4, channels=4, out_channels=4, patch=2, text_width=8,
                text_mode=text_mode, rngs=nnx.Rngs(0),
            )
        )  # fmt: skip
    yield nnx.eval_shape(
        lambda: VQVAE(
            n_codes=8, embedding_dim=4, n_hiddens=8, n_res_layers=1, downsample=(2, 2, 2),
            rngs=nnx.Rngs(0),
        )
    )  # fmt: skip


def test_every_parameter_has_axes_with_a_rule_and_every_rule_a_user():
    used = set()
    for model in models():
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            axes = variable.get_metadata().get("axes")
            assert axes is not None, f"{path}: no axes"
            assert len(axes) in (variable.ndim, variable.ndim - 1), f"{path}: {axes}"
            used |= set(axes) - {None}
    assert used == set(mesh_lib.RULES)


def test_sizes_that_do_not_fit_are_refused():
    assert dict(mesh_lib.make_mesh(sizes(data=-1, fsdp=2)).shape) == sizes(data=4, fsdp=2)
    with pytest.raises(ValueError, match="8 devices"):
        mesh_lib.make_mesh(sizes(data=3))
    with pytest.raises(ValueError, match="at most one"):
        mesh_lib.make_mesh(sizes(data=-1, fsdp=-1))
    with pytest.raises(ValueError, match="expected the axes"):
        mesh_lib.make_mesh({"data": 8})


def test_partition_spec():
    mesh = mesh_lib.make_mesh(sizes(data=2, fsdp=2, tensor=2))
    assert mesh_lib.partition_spec((6, 8, 4), ("embed", "heads"), mesh) == P(None, "fsdp", "tensor")
    # Three output channels stay whole over two devices.
    assert mesh_lib.partition_spec((8, 3), ("conv_in", "conv_out"), mesh) == P("fsdp", None)
    with pytest.raises(ValueError, match="embde"):
        mesh_lib.partition_spec((8,), ("embde",), mesh)


def test_a_batch_is_divided_over_both_data_axes():
    mesh = mesh_lib.make_mesh(sizes(data=2, fsdp=2, tensor=2))
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    batch = mesh_lib.shard_batch({"x": x}, mesh)["x"]
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(jax.device_get(batch), x)
