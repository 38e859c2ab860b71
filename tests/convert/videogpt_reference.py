"""VideoGPT's VQ-VAE in evaluation mode, by definition and in plain numpy, channels first.

Slow and literal (a sum over the taps of every kernel), so that it shares nothing with ours.
"""

import math
from itertools import product

import numpy as np


def random_state_dict(downsample, *, n_hiddens=8, embedding_dim=6, n_codes=16, depth=1, seed=0):
    """Weights under VideoGPT's names."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def add(name, *shape, scale=None, shift=0.0):
        scale = math.prod(shape[1:]) ** -0.5 if scale is None else scale
        tensors[name] = (shift + scale * rng.standard_normal(shape)).astype(np.float32)

    def conv(name, *shape, bias=None):
        add(f"{name}.weight", *shape)
        if bias:
            add(f"{name}.bias", bias, scale=0.1)

    def norm(name, width):
        add(f"{name}.weight", width, scale=0.1, shift=1.0)
        add(f"{name}.bias", width, scale=0.1)
        add(f"{name}.running_mean", width, scale=0.1)
        tensors[f"{name}.running_var"] = rng.uniform(0.5, 2, width).astype(np.float32)
        tensors[f"{name}.num_batches_tracked"] = np.array(7)

    def stack(name):
        for i in range(depth):
            block = f"{name}.{i}.block"
            norm(f"{block}.0", n_hiddens)
            conv(f"{block}.2.conv", n_hiddens // 2, n_hiddens, 3, 3, 3)
            norm(f"{block}.3", n_hiddens // 2)
            conv(f"{block}.5.conv", n_hiddens, n_hiddens // 2, 1, 1, 1)
            norm(f"{block}.6", n_hiddens)
            for axis in "wht":
                for projection in ("w_qs", "w_ks", "w_vs"):
                    add(f"{block}.8.attn_{axis}.{projection}.weight", n_hiddens, n_hiddens)
                conv(f"{block}.8.attn_{axis}.fc", n_hiddens, n_hiddens, bias=n_hiddens)
        norm(f"{name}.{depth}", n_hiddens)

    levels = int(math.log2(max(downsample)))
    for i in range(levels):
        width = n_hiddens if i else 3
        conv(f"encoder.convs.{i}.conv", n_hiddens, width, 4, 4, 4, bias=n_hiddens)
        width = n_hiddens if i < levels - 1 else 3
        conv(f"decoder.convts.{i}.convt", n_hiddens, width, 4, 4, 4, bias=width)
    conv("encoder.conv_last.conv", n_hiddens, n_hiddens, 3, 3, 3, bias=n_hiddens)
    stack("encoder.res_stack")
    stack("decoder.res_stack")
    conv("pre_vq_conv.conv", embedding_dim, n_hiddens, 1, 1, 1, bias=embedding_dim)
    conv("post_vq_conv.conv", n_hiddens, embedding_dim, 1, 1, 1, bias=n_hiddens)
    add("codebook.embeddings", n_codes, embedding_dim, scale=1.0)
    add("codebook.z_avg", n_codes, embedding_dim, scale=1.0)
    add("codebook.N", n_codes, scale=0.0, shift=1.0)
    return tensors


def pad_same(x, kernel, stride):
    pads = [((k - s + 1) // 2, (k - s) // 2) for k, s in zip(kernel, stride, strict=True)]
    return np.pad(x, [(0, 0), (0, 0), *pads])


def conv(tensors, name, x, stride=(1, 1, 1)):
    w = tensors[f"{name}.weight"]
    kernel = w.shape[2:]
    x = pad_same(x, kernel, stride)
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    out = np.zeros((len(x), len(w), *sizes))
    for tap in product(*map(range, kernel)):
        window = [slice(i, i + s * n, s) for i, s, n in zip(tap, stride, sizes, strict=True)]
        out += np.einsum("bcthw,oc->bothw", x[:, :, *window], w[:, :, *tap])
    return out + tensors.get(f"{name}.bias", np.zeros(len(w)))[:, None, None, None]


def conv_transpose(tensors, name, x, stride):
    w = tensors[f"{name}.weight"]
    kernel = w.shape[2:]
    x = pad_same(x, kernel, stride)
    sizes = [(n - 1) * s + k for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    out = np.zeros((len(x), w.shape[1], *sizes))
    for tap in product(*map(range, kernel)):
        window = [slice(i, i + s * n, s) for i, s, n in zip(tap, stride, x.shape[2:], strict=True)]
        out[:, :, *window] += np.einsum("bcthw,co->bothw", x, w[:, :, *tap])
    crop = [slice(k - 1, n - k + 1) for k, n in zip(kernel, sizes, strict=True)]
    return out[:, :, *crop] + tensors[f"{name}.bias"][:, None, None, None]


def norm(tensors, name, x):
    weight, bias, mean, variance = (
        tensors[f"{name}.{leaf}"][:, None, None, None]
        for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def attention(tensors, name, x, axis):
    """Two heads along one of the axes T, H, W of x (B, C, T, H, W)."""
    x = np.moveaxis(np.moveaxis(x, axis, -1), 1, -1)  # (B, ., ., S, C)
    q, k, v = (
        np.moveaxis((x @ tensors[f"{name}.{w}.weight"].T).reshape(*x.shape[:-1], 2, -1), -2, -3)
        for w in ("w_qs", "w_ks", "w_vs")
    )
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.moveaxis(weights / weights.sum(-1, keepdims=True) @ v, -3, -2).reshape(x.shape)
    out = out @ tensors[f"{name}.fc.weight"].T + tensors[f"{name}.fc.bias"]
    return np.moveaxis(np.moveaxis(out, -1, 1), -1, axis)


def relu(x):
    return np.maximum(x, 0)


def stack(tensors, name, x):
    depth = len({n for n in tensors if n.startswith(name) and n.endswith(".block.0.weight")})
    for i in range(depth):
        block = f"{name}.{i}.block"
        h = conv(tensors, f"{block}.2.conv", relu(norm(tensors, f"{block}.0", x)))
        h = conv(tensors, f"{block}.5.conv", relu(norm(tensors, f"{block}.3", h)))
        h = relu(norm(tensors, f"{block}.6", h))
        axes = {"attn_w": 4, "attn_h": 3, "attn_t": 2}
        x = x + sum(attention(tensors, f"{block}.8.{n}", h, axis) for n, axis in axes.items())
    return relu(norm(tensors, f"{name}.{depth}", x))


def strides(downsample):
    levels = [int(math.log2(n)) for n in downsample]
    return [tuple(2 if level > i else 1 for level in levels) for i in range(max(levels))]


def pre_vq(tensors, video, downsample):
    """Video (B, T, H, W, 3) to latents (B, t, h, w, D)."""
    x = np.moveaxis(video, -1, 1)
    for i, stride in enumerate(strides(downsample)):
        x = relu(conv(tensors, f"encoder.convs.{i}.conv", x, stride))
    x = stack(tensors, "encoder.res_stack", conv(tensors, "encoder.conv_last.conv", x))
    return np.moveaxis(conv(tensors, "pre_vq_conv.conv", x), 1, -1)


def nearest(tensors, z):
    """Latents (B, t, h, w, D) to codes (B, t, h, w)."""
    distances = ((z[..., None, :] - tensors["codebook.embeddings"]) ** 2).sum(-1)
    return distances.argmin(-1)


def decode(tensors, codes, downsample):
    """Codes (B, t, h, w) to video (B, T, H, W, 3)."""
    x = np.moveaxis(tensors["codebook.embeddings"][codes], -1, 1)
    x = stack(tensors, "decoder.res_stack", conv(tensors, "post_vq_conv.conv", x))
    for i, stride in enumerate(strides(downsample)):
        x = conv_transpose(tensors, f"decoder.convts.{i}.convt", x if i == 0 else relu(x), stride)
    return np.moveaxis(x, 1, -1)
