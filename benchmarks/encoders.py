"""Speed of the two frozen encoders at their published sizes, beside PyTorch where it is installed.

    python benchmarks/encoders.py
    python benchmarks/encoders.py --encoders clip --dtype bfloat16 --captions 256

Measures what preprocessing runs: VideoGPT's VQ-VAE (240 wide, 4 residual layers, stride 4 x 4 x 4,
2048 codes of 256 dimensions) on 16 frames of 128 x 128, and the text tower of CLIP ViT-B/32 on
captions of 77 tokens. Both libraries hold the same weights, and their outputs are compared before
they are timed, by turns: a ratio above 1 says that ours is faster in that pair. Without PyTorch
only our own figures are printed. GFLOP count the matrix products and convolutions.
"""

import argparse
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(sys.path.pop(0))  # this folder last: it has a tokenizers.py
# PyTorch needs its share of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.convert.clip import load_clip_text
from opensora_jax.convert.videogpt import load_videogpt
from opensora_jax.models.clip_text import ClipText, ClipTextConfig
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig

VQVAE_SIZES = {
    "n_codes": 2048,
    "embedding_dim": 256,
    "n_hiddens": 240,
    "n_res_layers": 4,
    "downsample": (4, 4, 4),
}
N_FRAMES, RESOLUTION = 16, 128
CLIP_SIZES = {
    "vocab_size": 49408,
    "width": 512,
    "depth": 12,
    "heads": 8,
    "mlp_width": 2048,
    "max_length": 77,
}


class Case(NamedTuple):
    """One encoder on one batch."""

    title: str
    gflop: float
    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray] | None
    check: Callable[[np.ndarray, np.ndarray], str]  # raises where outputs differ; says how much


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoders", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--videos", type=int, default=8, help="videos a batch")
    parser.add_argument("--captions", type=int, default=32, help="captions a batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pairs", type=int, default=7, help="times each library runs")
    args = parser.parse_args()
    with_torch = importlib.util.find_spec("torch") is not None
    devices = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {args.dtype}"
    print(f"{devices}, {'PyTorch' if with_torch else 'no PyTorch'}")
    for name in args.encoders:
        with tempfile.TemporaryDirectory() as folder:
            case = CASES[name](args, Path(folder) if with_torch else None)
        measure(case, args.pairs)


def measure(case: Case, pairs: int) -> None:
    """Prints the times of both libraries, by turns, and their ratio."""
    print(f"\n{case.title}, {case.gflop:.0f} GFLOP")
    outputs = case.ours(), case.theirs and case.theirs()  # compiles
    if case.theirs:
        print(f"same output: {case.check(*outputs)}")
    ours, theirs = [], []
    for pair in range(pairs):
        ours.append(seconds(case.ours))
        line = f"{pair + 1:3}  ours {speed(ours[-1], case)}"
        if case.theirs:
            theirs.append(seconds(case.theirs))
            line += f"  PyTorch {speed(theirs[-1], case)}  ratio {theirs[-1] / ours[-1]:.2f}"
        print(line, flush=True)
    line = f"median  ours {speed(statistics.median(ours), case)}"
    if case.theirs:
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        line += f"  PyTorch {speed(statistics.median(theirs), case)}  ratio {ratio:.2f}"
    print(line)


def seconds(run: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(duration: float, case: Case) -> str:
    return f"{duration * 1e3:.0f} ms ({case.gflop / duration:.0f} GFLOP/s)"


def vqvae_case(args: argparse.Namespace, folder: Path | None) -> Case:
    """`folder` is for the weights that PyTorch makes; without one ours are random."""
    dtype, shape = jnp.dtype(args.dtype), (args.videos, N_FRAMES, RESOLUTION, RESOLUTION, 3)
    video = np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)
    theirs = None
    if folder:
        import torch_encoders

        model = torch_encoders.make_vqvae(folder / "vqvae.ckpt", N_FRAMES, VQVAE_SIZES)
        theirs = torch_runner(model, args.dtype, np.moveaxis(video, -1, 1))
        model = load_videogpt(folder / "vqvae.ckpt", dtype=dtype)
    else:
        config = VQVAEConfig(**VQVAE_SIZES, n_frames=N_FRAMES)
        model = VQVAE(config, rngs=nnx.Rngs(0), dtype=dtype)
        model.eval()

    def check(ours, theirs):
        agreement, n_used = np.mean(ours == theirs), len(np.unique(theirs))
        text = f"{agreement:.3%} of the codes, {n_used} codes in use"
        if agreement < (0.999 if args.dtype == "float32" else 0.5) or n_used < 100:
            raise ValueError(f"{text}: expected nearly all, and more than 100 in use")
        return text

    title = f"VQ-VAE, {args.videos} x {N_FRAMES} frames of {RESOLUTION} x {RESOLUTION}"
    run = jax_runner(model, lambda model, video: model.encode(video), video)
    return Case(title, vqvae_gflop(model, shape), run, theirs, check)


def clip_case(args: argparse.Namespace, folder: Path | None) -> Case:
    """`folder` is for the weights that PyTorch makes; without one ours are random."""
    dtype = jnp.dtype(args.dtype)
    width, depth, length = (CLIP_SIZES[key] for key in ("width", "depth", "max_length"))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CLIP_SIZES["vocab_size"], (args.captions, length), np.int32)
    inputs = ids, np.ones_like(ids)
    theirs = None
    if folder:
        import torch_encoders

        model = torch_encoders.make_clip_text(folder, CLIP_SIZES)
        theirs = torch_runner(model, args.dtype, *inputs, output="last_hidden_state")
        model = load_clip_text(folder, dtype)
    else:
        model = ClipText(ClipTextConfig(**CLIP_SIZES), rngs=nnx.Rngs(0), dtype=dtype)

    def check(ours, theirs):
        difference = np.abs(ours - theirs).max()
        text = f"within {difference:.1g} of features up to {np.abs(theirs).max():.1f}"
        if difference > (1e-3 if args.dtype == "float32" else 0.5):
            raise ValueError(f"{text}: expected less")
        return text

    # Four projections of attention and an MLP of four times the width; then scores and averages.
    per_token = depth * (2 * 12 * width**2 + 4 * length * width)
    title = f"CLIP text, {args.captions} captions of {length} tokens"
    run = jax_runner(model, lambda model, *inputs: model(*inputs), *inputs)
    return Case(title, ids.size * per_token / 1e9, run, theirs, check)


CASES = {"vqvae": vqvae_case, "clip": clip_case}


def vqvae_gflop(model: VQVAE, shape: tuple[int, ...]) -> float:
    """Of the products with every weight of the encoder and every code."""
    n_batch, *sides, _ = shape
    total = 0
    for layer in model.encoder_convs:
        sides = [n // s for n, s in zip(sides, layer.stride, strict=True)]
        total += math.prod(sides) * layer.kernel[...].size
    rest = nnx.state((model.encoder_last, model.encoder_stack, model.pre_vq), nnx.Param)
    weights = [x.size for x in jax.tree.leaves(rest) if x.ndim > 1]
    total += math.prod(sides) * (sum(weights) + model.codebook.size)
    return 2 * n_batch * total / 1e9


def jax_runner(model: nnx.Module, apply: Callable, *inputs: np.ndarray) -> Callable:
    graph, state = nnx.split(model)
    jitted = jax.jit(lambda state, *inputs: apply(nnx.merge(graph, state), *inputs))
    inputs = jax.device_put(inputs)
    return lambda: np.asarray(jitted(state, *inputs))


def torch_runner(model, dtype: str, *inputs: np.ndarray, output: str = "") -> Callable:
    """`output`: the field of the model's output to take."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, dtype)
    torch.backends.cudnn.benchmark = True
    model = model.to(device, dtype)
    tensors = [torch.from_numpy(x).to(device) for x in inputs]
    tensors = [x.to(dtype) if x.is_floating_point() else x.long() for x in tensors]

    @torch.inference_mode()
    def run():
        y = model(*tensors)
        y = getattr(y, output) if output else y
        return (y.float() if y.is_floating_point() else y).cpu().numpy()

    return run


if __name__ == "__main__":
    main()
