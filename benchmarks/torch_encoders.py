"""The encoders in PyTorch, for `encoders.py` to compare with: the same functions, well written.

VideoGPT's VQ-VAE with the names of its checkpoints, and transformers' CLIP text tower. Their random
weights come to ours by way of the files that users have: a checkpoint, a folder of the hub.

Shape suffixes: B batch, C channels, T, H, W positions, S positions along one axis, N heads, K head.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel


class SamePadConv3d(nn.Module):
    def __init__(self, d_in: int, d_out: int, kernel: int, stride=(1, 1, 1), bias: bool = True):
        super().__init__()
        sides = [((kernel - s + 1) // 2, (kernel - s) // 2) for s in reversed(stride)]
        self.padding = [n for side in sides for n in side]
        self.conv = nn.Conv3d(d_in, d_out, kernel, stride, bias=bias)

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCTHW, self.padding))


class Attention(nn.Module):
    """Two-head self-attention along one axis of (B, T, H, W, C)."""

    def __init__(self, width: int, axis: int):
        super().__init__()
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.fc = nn.Linear(width, width)
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(y):
            y = y.movedim(self.axis, 3).unflatten(-1, (2, -1))
            return y.flatten(0, 2).transpose(1, 2)

        q_BNSK, k_BNSK, v_BNSK = heads(self.w_qs(x)), heads(self.w_ks(x)), heads(self.w_vs(x))
        out_BNSK = F.scaled_dot_product_attention(q_BNSK, k_BNSK, v_BNSK)
        shape = x.movedim(self.axis, 3).shape
        return self.fc(out_BNSK.transpose(1, 2).reshape(shape).movedim(3, self.axis))


class AxialBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn_t, self.attn_h, self.attn_w = (Attention(width, axis) for axis in (1, 2, 3))

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        x = x_BCTHW.movedim(1, -1).contiguous()
        return (self.attn_t(x) + self.attn_h(x) + self.attn_w(x)).movedim(-1, 1)


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.BatchNorm3d(width),
            nn.ReLU(),
            SamePadConv3d(width, width // 2, 3, bias=False),
            nn.BatchNorm3d(width // 2),
            nn.ReLU(),
            SamePadConv3d(width // 2, width, 1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            AxialBlock(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


def residual_stack(width: int, depth: int) -> nn.Sequential:
    blocks = [ResidualBlock(width) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.BatchNorm3d(width), nn.ReLU())


class VQVAE(nn.Module):
    """What encodes, and of the decoder and the codebook's averages what a checkpoint holds."""

    def __init__(self, n_codes, embedding_dim, n_hiddens, n_res_layers, downsample):
        super().__init__()
        levels = [int(math.log2(d)) for d in downsample]
        strides = [tuple(2 if level > i else 1 for level in levels) for i in range(max(levels))]
        widths = [3] + [n_hiddens] * len(strides)
        self.encoder = nn.Module()
        self.encoder.convs = nn.ModuleList(
            [SamePadConv3d(*widths[i : i + 2], 4, stride) for i, stride in enumerate(strides)]
        )
        self.encoder.conv_last = SamePadConv3d(n_hiddens, n_hiddens, 3)
        self.encoder.res_stack = residual_stack(n_hiddens, n_res_layers)
        self.pre_vq_conv = SamePadConv3d(n_hiddens, embedding_dim, 1)
        self.codebook = nn.Module()
        self.codebook.register_buffer("embeddings", torch.zeros(n_codes, embedding_dim))
        self.codebook.register_buffer("N", torch.ones(n_codes))
        self.codebook.register_buffer("z_avg", torch.ones(n_codes, embedding_dim))
        self.post_vq_conv = SamePadConv3d(embedding_dim, n_hiddens, 1)
        self.decoder = nn.Module()
        self.decoder.res_stack = residual_stack(n_hiddens, n_res_layers)
        self.decoder.convts = nn.ModuleList([nn.Module() for _ in strides])
        for module, width in zip(self.decoder.convts, reversed(widths[:-1]), strict=True):
            module.convt = nn.ConvTranspose3d(n_hiddens, width, 4)

    def latents(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Before quantization, (B, t, h, w, embedding_dim)."""
        h = video_BCTHW
        for conv in self.encoder.convs:
            h = F.relu(conv(h))
        z = self.pre_vq_conv(self.encoder.res_stack(self.encoder.conv_last(h)))
        return z.movedim(1, -1).float()

    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Codes (B, t, h, w)."""
        z = self.latents(video_BCTHW)
        codebook = self.codebook.embeddings.float()
        # |z|^2 is the same for all codes.
        norms = codebook.square().sum(-1)
        distance = torch.addmm(norms, z.flatten(0, 3), codebook.T, alpha=-2.0)
        return distance.argmin(-1).view(z.shape[:-1])


@torch.no_grad()
def make_vqvae(checkpoint: Path, n_frames: int, sizes: dict) -> VQVAE:
    """A VQ-VAE of random weights, in evaluation mode, which is also written to `checkpoint`."""
    torch.manual_seed(0)
    model = VQVAE(**sizes).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    # As in training, the first codes are latents: then many are in use.
    z = model.latents(torch.rand(1, 3, n_frames, 128, 128) - 0.5).flatten(0, 3)
    model.codebook.embeddings.copy_(z[torch.randperm(len(z))[: sizes["n_codes"]]])
    hyper_parameters = {"downsample": tuple(sizes["downsample"]), "sequence_length": n_frames}
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": hyper_parameters}, checkpoint)
    return model


def make_clip_text(folder: Path, sizes: dict) -> CLIPTextModel:
    """A text tower of random weights, in evaluation mode, which is also written to `folder`."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["mlp_width"],
        max_position_embeddings=sizes["max_length"],
        hidden_act="quick_gelu",
    )
    model = CLIPTextModel(config).eval()
    model.save_pretrained(folder)
    return model
