"""Planning for TPU slices: what the figures mean, and what is shipped compiled for its slices."""

import importlib
import itertools
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs import default
from opensora_jax import mesh as mesh_lib
from opensora_jax import plan
from opensora_jax.models import flops
from opensora_jax.models.dit import REMAT_POLICIES
from opensora_jax.planning import chips, synthetic
from opensora_jax.planning import compile as aot
from opensora_jax.planning.hlo import Collective, Shape

# Each shipped configuration that names slices, and those slices.
SHIPPED = [
    ("dit_xl2", "v5e:4x4"),
    ("dit_xl2", "v6e:4x4"),
    ("dit_3b", "v5p:4x4x4"),
    ("dit_3b", "v5p:4x8x8"),
    ("dit_7b", "v5p:4x4x4"),
    ("dit_7b", "v5p:4x8x8"),
]


def shipped(name):
    return importlib.import_module(f"configs.{name}").get_config()


class Device(NamedTuple):
    coords: tuple[int, int, int]


class Mesh(NamedTuple):
    devices: np.ndarray
    axis_names: tuple[str, ...]

    @property
    def shape(self):
        return dict(zip(self.axis_names, self.devices.shape, strict=True))


def planned(kind, shape, axes, **fields):
    """A plan for a slice of `shape`, whose mesh has one axis for each dimension."""
    devices = np.empty(shape, object)
    for place in np.ndindex(*shape):
        devices[place] = Device((*place, 0, 0)[:3])
    mesh = Mesh(devices, axes)
    facts = {
        "slice": chips.Slice("name", chips.CHIPS[kind], list(devices.flat)),
        "mesh": mesh,
        "remat": "full",
        "n_parameters": 1000,
        "tokens": 64,
        "model_flops": 1e12,
        "state_bytes": {"parameters": 2**30},
        "weight_sizes": frozenset({(64, 256)}),
        "compile_seconds": 1.0,
    }
    return aot.Plan(**facts | fields)


def collective(kind, dims, groups, count=1, gathers=False):
    return Collective(kind, (Shape("bf16", dims, True),), np.array(groups), count, gathers)


ALL, ROWS = [list(range(16))], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize(
    ("kind", "shape", "what", "groups", "seconds"),
    [
        # 2 GB to all of a v5e 4x4, which is no ring: over two lines of 50 GB/s.
        ("v5e", (4, 4), "all-gather", ALL, 2 * 15 / 16 / 100),
        ("v5e", (4, 4), "reduce-scatter", ROWS, 2 * 3 / 4 / 50),
        ("v5e", (4, 4), "all-reduce", ROWS, 2 * 2 * 3 / 4 / 50),
        # v5p closes rings from 4 on: twice 100 GB/s a dimension.
        ("v5p", (4, 4), "all-gather", ALL, 2 * 15 / 16 / 400),
        ("v5p", (4, 4), "all-to-all", ROWS, 2 / 200),
        ("v5p", (4, 4), "collective-permute", [[0, 1], [1, 2]], 2 / 100),
        ("v5p", (4, 4), "all-reduce", [[0], [1]], 0.0),
    ],
)
def test_time_of_a_collective(kind, shape, what, groups, seconds):
    found = planned(kind, shape, ("fsdp", "tensor"))
    assert found.link_seconds(collective(what, (10**9,), groups)) == pytest.approx(seconds)


def test_what_is_sent_and_where():
    found = planned("v5p", (4, 4), ("fsdp", "tensor"))
    assert found.mesh_axes(collective("all-gather", (8,), ALL)) == "fsdp, tensor"
    assert found.mesh_axes(collective("all-gather", (8,), ROWS)) == "tensor"
    assert found.purpose(collective("all-gather", (1, 256, 64), ROWS)) == "weights"
    assert found.purpose(collective("reduce-scatter", (64, 256), ROWS)) == "gradients"
    assert found.purpose(collective("all-reduce", (64, 256), ROWS)) == "gradients"
    assert found.purpose(collective("all-reduce", (64, 256), ROWS, gathers=True)) == "weights"
    assert found.purpose(collective("all-reduce", (8, 64, 256), ROWS)) == "activations"
    assert found.purpose(collective("all-reduce", (), ROWS)) == "scalars"


def test_bounds_and_report():
    found = planned(
        "v5p",
        (4, 4),
        ("fsdp", "tensor"),
        flops=459e12 / 10,
        hbm_bytes=2765e9 / 20,
        temporary_bytes=4 * 2**30,
        collectives=(collective("all-gather", (64, 256), ALL, count=3),),
        model_flops=16 * 459e12 / 20,
    )
    assert (found.compute_seconds, found.memory_seconds) == pytest.approx((0.1, 0.05))
    assert found.mfu_bound == pytest.approx(0.5)
    assert found.fits
    text = plan.report(found)
    assert "| headroom | 90.74 |" in text
    assert "| all-gather | weights, bf16 | fsdp, tensor | 3 | 0.000 | 0.00 |" in text
    assert "MFU at most 50.0%. Fits." in text


def test_evaluation_and_sampling_count():
    gib = 2**30
    fields = {"temporary_bytes": 4 * gib, "evaluation_bytes": 6 * gib, "sampling_bytes": 5 * gib}
    found = planned("v5e", (4, 4), ("fsdp", "tensor"), flops=1.0, **fields)
    assert found.total_bytes == 7 * gib
    text = plan.report(found)
    assert "while losses are validated | 6.00 |" in text
    assert "while videos are drawn | 5.00 |" in text
    fields["sampling_bytes"] = 15 * gib
    assert not planned("v5e", (4, 4), ("fsdp", "tensor"), **fields).fits


def test_what_does_not_fit():
    assert not planned("v5e", (4, 4), ("fsdp", "tensor"), temporary_bytes=15 * 2**30).fits
    refused = planned("v5e", (4, 4), ("fsdp", "tensor"), refusal="20G of 15.75G")
    assert not refused.fits
    assert plan.report(refused).endswith("Does not fit: 20G of 15.75G")


@pytest.mark.parametrize("n", [4, 16])
def test_candidates_divide_the_devices(n):
    config = shipped("dit_7b")
    seen = list(plan.candidates(config, n))
    shapes = [[c.mesh[axis] for axis in mesh_lib.AXES] for c in seen]
    assert {np.prod(shape) for shape in shapes} == {n}
    remats = [c.dit.remat for c in seen]
    assert len({(*shape, remat) for shape, remat in zip(shapes, remats, strict=True)}) == len(seen)
    assert {c.dit.remat for c in seen} == set(REMAT_POLICIES)
    assert seen[0].dit.remat == "full"
    assert dict(config.mesh) == dict(shipped("dit_7b").mesh)


def test_a_sweep_ranks_what_fits_and_leaves_out_the_rest(monkeypatch, capsys):
    seconds = {("full", 1): 0.4, ("none", 1): 0.3, ("full", 2): 0.2}
    tried = []

    def make(candidate, where):
        remat, data = candidate.dit.remat, candidate.mesh.data
        tried.append((remat, data))
        if data == 4:
            raise ValueError("dit.batch_size=6: expected a multiple of 4")
        return planned(
            "v5p",
            (data, 16 // data),
            ("data", "fsdp"),
            remat=remat,
            flops=459e12 * seconds.get((remat, data), 1.0),
            temporary_bytes=0 if (remat, data) in seconds else 96 * 2**30,
        )

    def candidates(config, n):
        for data, remat in itertools.product((1, 2, 4, 8), ("full", "none")):
            candidate = config.copy_and_resolve_references()
            candidate.mesh.data, candidate.dit.remat = data, remat
            yield candidate

    monkeypatch.setattr(plan.aot, "make", make)
    monkeypatch.setattr(plan, "candidates", candidates)
    table = plan.sweep(shipped("dit_7b"), planned("v5p", (4, 4), ("data", "fsdp")).slice)
    rows = [line.split("|")[1:4] for line in table.splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["data=2 fsdp=8", "full", "1.0"],
        ["fsdp=16", "none", "1.0"],
        ["fsdp=16", "full", "1.0"],
    ]
    # What does not fit with least memory, or cannot be, is not tried with more.
    assert tried == [("full", 1), ("none", 1), ("full", 2), ("none", 2), ("full", 4), ("full", 8)]
    printed = capsys.readouterr().err
    assert "left out: dit.batch_size=6: expected a multiple of 4" in printed
    assert "data=8 fsdp=2, remat full: does not fit" in printed


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:banana", "4x4"])
def test_a_wrong_topology(name):
    with pytest.raises(ValueError, match=rf"--topology={name}: expected .*v5p:4x4x8"):
        chips.tpu_slice(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[tpu\]'"):
        chips.tpu_slice("v5e:4x4")


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in SHIPPED))
def test_parameters_are_the_formula_s(name):
    config = shipped(name)
    training = synthetic.training(config)
    params, _ = jax.eval_shape(training.task.init, jax.random.key(0))
    n = flops.dit_parameters(training.task.config)
    assert sum(x.size for x in jax.tree.leaves(params)) == n
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) == 4 * n


@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), SHIPPED)
def test_shipped_configurations_compile_for_their_slices(name, topology):
    config = shipped(name)
    width, heads = config.dit.width, config.dit.heads
    if config.dit.size:
        width, heads = 1152, 16
    config.dit.update(size="", depth=2, width=width, heads=heads)
    found = aot.make(config, chips.tpu_slice(topology))
    assert found.fits, plan.report(found)
    assert found.unknown_loops == 0
    # Rematerialization computes the blocks' forward pass again, a third on top, and the kernels of
    # attention their products a second time.
    n_devices = len(found.slice.devices)
    assert found.model_flops < n_devices * found.flops < 1.7 * found.model_flops
    state = sum(found.state_bytes.values())
    # Biases are whole on every chip: two in a hundred, at this depth, of what 64 chips share.
    assert state == pytest.approx(4 * 4 * found.n_parameters / found.mesh.shape["fsdp"], rel=0.03)
    # Weights are gathered, block by block, once forward and once backward, and their gradients
    # summed; activations stay where they are.
    sent = {"weights": 0, "gradients": 0, "activations": 0, "scalars": 0}
    for c in found.collectives:
        sent[found.purpose(c)] += c.count * c.bytes
    weights = config.dit.accumulate * 2 * found.n_parameters  # bytes in bfloat16
    assert weights < sent["weights"] < 2.05 * weights
    assert sent["activations"] < 0.01 * sum(sent.values())
    assert 0 < found.mfu_bound < 1


@pytest.mark.slow
def test_a_sweep_of_a_slice(monkeypatch):
    config = shipped("dit_xl2")
    config.dit.update(size="", depth=2, width=256, heads=4, batch_size=8, accumulate=1)
    config.preprocess.resolution = 64
    every = plan.candidates
    monkeypatch.setattr(plan, "candidates", lambda *args: itertools.islice(every(*args), 2))
    table = plan.sweep(config, chips.tpu_slice("v5e:2x2")).splitlines()[2:]
    assert {line.split(" | ")[1] for line in table} == {"full", "offload"}
    assert all(line.startswith("| fsdp=4 | ") for line in table)


@pytest.mark.slow
def test_seven_billion_parameters_for_a_slice():
    config = shipped("dit_7b")
    found = aot.make(config, chips.tpu_slice("v5p:4x4x8"))
    assert found.fits, plan.report(found)
    assert found.n_parameters == flops.dit_parameters(synthetic.training(config).task.config)
    held = found.state_bytes["parameters"] * found.mesh.shape["fsdp"]
    assert held == pytest.approx(4 * found.n_parameters, rel=0.01)  # biases are whole everywhere


@pytest.mark.slow
def test_sampling_takes_a_share_of_the_weights_and_a_training_counts_it():
    config = shipped("dit_xl2")
    config.dit.update(size="", depth=2, width=1152, heads=16)
    where = chips.tpu_slice("v5e:2x2")
    found = aot.make_sampling(config, where)
    assert found.fits
    assert "Fits." in plan.sampling_report(found)
    training = aot.make(config, where)
    assert found.weight_bytes == pytest.approx(training.state_bytes["parameters"] / 2, rel=0.01)
    assert 0 < training.evaluation_bytes < 2 * training.temporary_bytes
    assert training.sampling_bytes > 0


@pytest.mark.slow
def test_a_slice_that_does_not_exist():
    with pytest.raises(ValueError, match=r"--topology=v5p:3x5: expected .*chips_per_host_bounds"):
        chips.tpu_slice("v5p:3x5")


def test_latents_of_a_causal_tokenizer_are_counted_as_it_counts():
    config = default.get_config()
    config.vqvae.update(architecture="cosmos", quantizer="fsq", downsample=(4, 8, 8), n_frames=17)
    assert synthetic.latent_grid(config) == (5, 16, 16)
    assert synthetic.training(config).task.latents.table.shape == (64_000, 6)
    config.vqvae.update(architecture="videogpt", n_frames=16)
    assert synthetic.latent_grid(config) == (4, 16, 16)
