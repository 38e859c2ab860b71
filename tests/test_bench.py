"""The benchmark of the train step: what it needs, what it measures, what it prints."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

from configs import quickstart
from opensora_jax import bench
from opensora_jax import mesh as mesh_lib
from opensora_jax.planning import programs, synthetic

LOADED = """
import sys
{imports}
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""


def loaded(imports):
    """The packages that are loaded after these imports."""
    out = subprocess.run(
        [sys.executable, "-c", LOADED.format(imports=imports)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    return set(out.stdout.split())


def test_it_needs_jax_flax_optax_and_ml_collections_only():
    these = "import absl.app, flax.nnx, flax.struct, jax, ml_collections.config_flags, optax"
    ours = loaded("import configs.default, opensora_jax.bench") - {"configs", "opensora_jax"}
    theirs = loaded(these) | sys.stdlib_module_names
    assert {name for name in ours - theirs if not name.startswith("_")} == set()


def test_tokens_that_the_context_axis_does_not_divide():
    config = quickstart.get_config()
    config.dit.n_latent_frames, config.preprocess.resolution = 1, 16
    config.mesh.update(data=1, context=8)
    with pytest.raises(ValueError, match=r"mesh\.context=8: expected a divisor of the 4 tokens"):
        bench.Bench(config)


def test_a_measurement():
    config = quickstart.get_config()
    config.stages = ("dit",)
    config.vqvae.n_codes = 16
    # AdamW compiles in a third of Muon's time.
    config.dit.update(depth=1, width=32, heads=2, unroll=1, batch_size=8, optimizer="adamw")
    config.preprocess.resolution = 16
    assert synthetic.latent_grid(config) == (4, 8, 8)
    measured = bench.Bench(config).measure(3)
    assert (measured.n_devices, measured.batch_size, measured.tokens) == (8, 8, 16)
    assert measured.seconds > 0
    assert measured.compile_seconds > 0
    # On each device at least its parameters, their average, two moments and the new ones.
    assert measured.peak_bytes > 4 * 4 * measured.n_parameters
    assert measured.tokens_per_second == pytest.approx(8 * 16 / measured.seconds)
    assert measured.mfu is None
    assert "| - |" in bench.table(measured)

    on_v5p = dataclasses.replace(
        measured, device_kind="TPU v5", n_devices=4, flops=459e12, seconds=0.5
    )
    assert on_v5p.mfu == pytest.approx(0.5)
    assert "| 4 x TPU v5 |" in bench.table(on_v5p)
    assert "| 230 | 50.0% |" in bench.table(on_v5p)


@pytest.mark.parametrize(
    ("objective", "sampler", "quantizer"),
    [("ddpm", "ancestral", "vq"), ("masked", "auto", "vq"), ("metric", "auto", "fsq")],
)
def test_samples_of_every_objective_can_be_planned(objective, sampler, quantizer):
    config = quickstart.get_config()
    config.stages = ("dit",)
    config.vqvae.update(n_codes=16, quantizer=quantizer, levels=(4, 3))
    config.dit.update(depth=1, width=32, heads=2, unroll=1, batch_size=8, objective=objective)
    config.dit.components = "auto"
    config.sample.sampler = sampler
    config.preprocess.resolution = 16
    training = synthetic.training(config)
    mesh = mesh_lib.make_mesh(config.mesh)
    program = programs.sampling(config, training, mesh)
    params, _ = jax.eval_shape(training.task.init, jax.random.key(0))
    with jax.set_mesh(mesh):
        assert "while" in program.lower(params).as_text()
