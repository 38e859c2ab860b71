"""The DiT's train step in PyTorch, the same function as ours, for `vs_torch.py` to compare with.

One matmul for queries, keys and values, scaled_dot_product_attention, fused AdamW, multi-tensor
averaging and clipping, torch.compile around the loss where asked for; bfloat16 by autocast on GPUs.

Shape suffixes: B batch, N video tokens, S text tokens, D width, E text width, H heads, K head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

TIME_FEATURES, TIME_SCALE = 256, 1000.0


def sinusoid(x: torch.Tensor, width: int, max_period: float) -> torch.Tensor:
    half = width // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=x.device) / half)
    angle = x.float()[..., None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width - 2 * half))


def coordinates(grid: tuple[int, int, int]) -> list[torch.Tensor]:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in grid], indexing="ij")
    return [axis.reshape(-1) for axis in axes]


def positions(grid: tuple[int, int, int], width: int) -> torch.Tensor:
    each = width // 6 * 2
    parts = [sinusoid(x, each, 100.0) for x in coordinates(grid)]
    return F.pad(torch.cat(parts, dim=-1), (0, width - 3 * each))


def rotary_angles(grid: tuple[int, int, int], head_dim: int) -> torch.Tensor:
    pairs = head_dim // 2
    spatial = pairs // 3
    counts = (pairs - 2 * spatial, spatial, spatial)
    parts = [
        x[:, None] * 100.0 ** (-torch.arange(n) / max(n, 1))
        for x, n in zip(coordinates(grid), counts, strict=True)
    ]
    return torch.cat(parts, dim=-1)


def rotate(x_BHNK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x_BHNK.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x_BHNK)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, cross: bool):
        super().__init__()
        self.heads, self.cross = heads, cross
        if cross:
            self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.query_scale = nn.Parameter(torch.ones(width // heads))
        self.key_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)

    def forward(self, x_BND, text_BSD=None, mask=None, rotary=None):
        if self.cross:
            parts = self.query(x_BND), *self.key_value(text_BSD).chunk(2, dim=-1)
        else:
            parts = self.qkv(x_BND).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        q = F.rms_norm(q, q.shape[-1:], self.query_scale.to(q.dtype), eps=1e-6)
        k = F.rms_norm(k, k.shape[-1:], self.key_scale.to(k.dtype), eps=1e-6)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        out_BHNK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out_BHNK.transpose(1, 2).flatten(2))


def modulate(x_BND, shift_BD, scale_BD):
    return (
        F.layer_norm(x_BND, x_BND.shape[-1:], eps=1e-6) * (1 + scale_BD[:, None])
        + shift_BD[:, None]
    )


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads, cross=False)
        self.cross_attention = Attention(width, heads, cross=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, condition_BD, text_BSD, mask, rotary):
        modulation = self.modulation(F.silu(condition_BD)).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + gate_a[:, None] * self.attention(modulate(x, shift_a, scale_a), rotary=rotary)
        x = x + self.cross_attention(F.layer_norm(x, x.shape[-1:], eps=1e-6), text_BSD, mask)
        h = self.down(F.gelu(self.up(modulate(x, shift_m, scale_m)), approximate="tanh"))
        return x + gate_m[:, None] * h


class DiT(nn.Module):
    """`opensora_jax.models.dit.DiT` with cross-attention; the same number of parameters."""

    def __init__(self, *, depth, width, heads, channels, patch, text_width, grid):
        super().__init__()
        self.patch, self.grid = patch, grid
        tokens = (grid[0], grid[1] // patch, grid[2] // patch)
        self.patch_embedding = nn.Linear(patch**2 * channels, width)
        self.time_in, self.time_out = nn.Linear(TIME_FEATURES, width), nn.Linear(width, width)
        self.null_text = nn.Parameter(0.02 * torch.randn(text_width))
        self.text_in, self.pooled_in = nn.Linear(text_width, width), nn.Linear(text_width, width)
        self.pooled_out = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch**2 * channels)
        angles = rotary_angles(tokens, width // heads)
        self.register_buffer("positions", positions(tokens, width))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x_BTHWC, time_B, text_BSE, lengths_B, drop_B):
        b, (t, h, w), p = len(x_BTHWC), self.grid, self.patch
        text_BSE = torch.where(drop_B[:, None, None], self.null_text, text_BSE)
        lengths_B = torch.where(drop_B, 1, lengths_B)
        text_BSE = F.layer_norm(text_BSE, text_BSE.shape[-1:], eps=1e-6)
        valid_BS = torch.arange(text_BSE.shape[1], device=text_BSE.device) < lengths_B[:, None]
        mean_BE = (text_BSE * valid_BS[..., None]).sum(1) / lengths_B[:, None]
        condition_BD = self.time_out(
            F.silu(self.time_in(sinusoid(time_B, TIME_FEATURES, 10_000.0)))
        ) + self.pooled_out(F.silu(self.pooled_in(mean_BE)))
        text_BSD = self.text_in(text_BSE)
        x = x_BTHWC.reshape(b, t, h // p, p, w // p, p, -1).permute(0, 1, 2, 4, 3, 5, 6)
        x = self.patch_embedding(x.reshape(b, t * (h // p) * (w // p), -1))
        x = x + self.positions.to(x.dtype)
        mask = valid_BS[:, None, None]
        for block in self.blocks:
            x = block(x, condition_BD, text_BSD, mask, (self.cos, self.sin))
        x = modulate(x, *self.final_modulation(F.silu(condition_BD)).chunk(2, dim=-1))
        x = self.final(x).reshape(b, t, h // p, w // p, p, p, -1)
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, t, h, w, -1).float()


class Training:
    """Rectified flow on a fixed batch, AdamW, clipping and an average of the weights.

    Args:
      dit: arguments of `DiT`.
      codebook: (n_codes, channels) float32.
      batch: numpy arrays "codes" (B, T, H, W), "text" (B, S, E), "text_length" (B,).
    """

    def __init__(self, dit, codebook, batch, *, compiled: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        model = DiT(**dit).to(self.device)
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.codebook = torch.from_numpy(codebook).to(self.device)
        self.batch = {k: torch.from_numpy(v).to(self.device) for k, v in batch.items()}
        self.model = model
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, codes, text, text_length):
        x_0 = self.codebook[codes]
        noise = torch.randn_like(x_0)
        t_B = torch.sigmoid(torch.randn(len(x_0), device=x_0.device))
        drop_B = torch.rand(len(x_0), device=x_0.device) < 0.1
        t = t_B[:, None, None, None, None]
        x_t = (1 - t) * x_0 + t * noise
        bfloat16 = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            velocity = self.model(x_t, t_B * TIME_SCALE, text, text_length, drop_B)
        return F.mse_loss(velocity, noise - x_0)

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(**self.batch).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - 0.9999)
