"""The mesh, and the rule table that every parameter's axes go through."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opensora_jax import mesh as mesh_lib
from opensora_jax.models.dit import TEXT_MODES, DiT, DiTConfig
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig


def sizes(**given):
    return dict.fromkeys(mesh_lib.AXES, 1) | given


def models(width=32):
    dit = DiTConfig(
        depth=2, width=width, heads=2, channels=4, out_channels=4, patch=2, text_width=8, n_codes=8
    )
    for text_mode in TEXT_MODES:
        config = dataclasses.replace(dit, text_mode=text_mode)
        yield nnx.eval_shape(lambda config=config: DiT(config, rngs=nnx.Rngs(0)))
    vqvae = VQVAEConfig(
        n_codes=8, embedding_dim=4, n_hiddens=width, n_res_layers=1, downsample=(2, 2, 2)
    )
    yield nnx.eval_shape(lambda: VQVAE(vqvae, rngs=nnx.Rngs(0)))


def param_shardings(model, **given):
    """Of a model, on a mesh of these sizes."""
    rules = mesh_lib.VQVAE_RULES if isinstance(model, VQVAE) else mesh_lib.DIT_RULES
    params = nnx.state(model, nnx.Param)
    return mesh_lib.param_shardings(params, rules, mesh_lib.make_mesh(sizes(**given)))


def test_every_parameter_has_axes_with_a_rule_and_every_rule_a_user():
    used = set()
    for model in models():
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            axes = variable.get_metadata().get("axes")
            assert axes is not None, f"{path}: no axes"
            assert len(axes) in (variable.ndim, variable.ndim - 1), f"{path}: {axes}"
            used |= set(axes) - {None}
        param_shardings(model, data=8)
    assert used == set(mesh_lib.DIT_RULES) | set(mesh_lib.VQVAE_RULES)


def test_names_without_rule_and_rules_without_name_are_refused_at_start():
    for model in models():
        params, mesh = nnx.state(model, nnx.Param), mesh_lib.make_mesh(sizes(data=8))
        with pytest.raises(ValueError, match=r"logical axis '\w+': no rule; known are width"):
            mesh_lib.param_shardings(params, {"width": ("fsdp",)}, mesh)
        rules = mesh_lib.DIT_RULES | mesh_lib.VQVAE_RULES | {"hidden": ("tensor",)}
        with pytest.raises(ValueError, match="hidden: rules that no parameter uses"):
            mesh_lib.param_shardings(params, rules, mesh)


def test_a_mesh_axis_that_divides_no_parameter_is_refused():
    dit, _, vqvae = models(width=12)
    for model, axis in ((dit, "fsdp"), (vqvae, "tensor")):
        with pytest.raises(ValueError, match=rf"mesh\.{axis}=8: divides no parameter"):
            param_shardings(model, **{axis: 8})


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

    def spec(shape, axes, rules):
        return mesh_lib.partition_spec(shape, axes, rules, mesh)

    rules = mesh_lib.DIT_RULES | mesh_lib.VQVAE_RULES
    assert spec((6, 8, 4), ("embed", "heads"), rules) == P(None, "fsdp", "tensor")
    # Three output channels stay whole over two devices.
    assert spec((8, 3), ("conv_in", "conv_out"), rules) == P("fsdp", None)
    # Two examples can be sharded over data, not over fsdp as well.
    activations = mesh_lib.ACTIVATION_RULES
    assert spec((4, 5), ("batch", None), activations) == P(("data", "fsdp"), None)
    assert spec((2, 5), ("batch", None), activations) == P("data", None)
    # Features of activations are whole where fsdp divides the parameters they meet.
    assert spec((8, 8), ("embed", "heads"), activations) == P(None, "tensor")
    with pytest.raises(ValueError, match="embde"):
        spec((8,), ("embde",), rules)


def test_constrain():
    mesh = mesh_lib.make_mesh(sizes(data=2, context=2, tensor=2))
    x = np.zeros((4, 6, 8), np.float32)
    constrain = jax.jit(lambda x: mesh_lib.constrain(x, "batch", "sequence", None))
    with jax.set_mesh(mesh):
        assert constrain(x).sharding.spec == P("data", "context")
        with pytest.raises(ValueError, match="sequenec"):
            jax.jit(lambda x: mesh_lib.constrain(x, ..., "sequenec"))(x)
    # The leading dimensions are left to the compiler, which leaves them as they are.
    given = jax.device_put(x, NamedSharding(mesh, P("data", None, None)))
    features = jax.jit(lambda x: mesh_lib.constrain(x, ..., "heads"))
    with jax.set_mesh(mesh):
        assert features(given).sharding.spec == P("data", None, "tensor")
    # Without a mesh there is nothing to do, and nothing in the program.
    text = jax.jit(lambda x: mesh_lib.constrain(x, "batch", "sequence", None)).lower(x).as_text()
    assert "sharding" not in text


def test_shard_map_gives_each_device_its_part():
    seen = []

    def add(x, y):
        seen.append((x.shape, y.shape))
        return x + y[:, None]

    x, y = np.arange(48.0).reshape(4, 6, 2), np.arange(8.0).reshape(4, 2)
    axes = ("batch", "sequence", None), ("batch", None)
    with jax.set_mesh(mesh_lib.make_mesh(sizes(data=2, context=2, tensor=2))):
        out = jax.jit(lambda x, y: mesh_lib.shard_map(add, *axes)(x, y))(x, y)
    np.testing.assert_array_equal(out, add(x, y))
    assert out.sharding.spec == P("data", "context")
    assert seen[0] == ((2, 3, 2), (2, 2))
    assert mesh_lib.shard_map(add, *axes) is add  # without a mesh


def test_a_batch_is_divided_over_both_data_axes():
    mesh = mesh_lib.make_mesh(sizes(data=2, fsdp=2, tensor=2))
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    batch = mesh_lib.shard_batch({"x": x}, mesh)["x"]
    assert {s.data.shape for s in batch.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(jax.device_get(batch), x)
    np.testing.assert_array_equal(mesh_lib.local_batch_indices(mesh, 8), np.arange(8))


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh looks at in a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(
    ("given", "axis"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 0),
        ({"data": 4, "context": 2}, 0),
        ({"fsdp": 4, "context": 2}, 1),
    ],
)
def test_slices_are_divided_over_data_or_else_over_fsdp(given, axis):
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    mesh = mesh_lib.make_mesh(sizes(**given), devices)
    assert dict(mesh.shape) == sizes(**given)
    # Along that axis the first half is one slice and the second the other.
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for i, half in enumerate(np.split(slices, 2, axis=axis)):
        assert (half == i).all()
    with pytest.raises(ValueError, match=r"data=1, mesh\.fsdp=1: the 2 slices do not divide them"):
        mesh_lib.make_mesh(sizes(context=8), devices)
