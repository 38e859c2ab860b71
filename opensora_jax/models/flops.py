"""How much a DiT computes and how many parameters it has, by formula.

Model FLOPs, as MFU wants them (arXiv:2204.02311, appendix B): matrix products only, a multiply-add
counted as two, nothing for what rematerialization computes again.

D width, E text width, N video tokens, S text tokens, p patch, C channels of a latent.
"""

from opensora_jax.models.dit import MLP_RATIO, TIME_FEATURES, DiTConfig


def dit_step_flops(
    dit: DiTConfig, *, grid: tuple[int, int, int], text_length: int, batch_size: int
) -> float:
    """FLOPs of one training step on a global batch: the forward pass and twice that for gradients.

    Args:
      grid: (T, H, W) of the latents.
      text_length: S, text tokens of an example, padding included.
      batch_size: examples over all devices and microbatches.
    """
    d, e, p, s = dit.width, dit.text_width, dit.patch, text_length
    t, h, w = grid
    n = t * (h // p) * (w // p)
    patches_in = n * p * p * dit.in_channels * d
    time_in = TIME_FEATURES * d
    embeddings = d * d + s * e * d + e * d + d * d
    if dit.text_mode == "in_context":
        sequence, cross = n + s, 0
    else:
        # Queries and output of the video's tokens, keys and values of the text's, scores, sums.
        sequence, cross = n, 2 * n * d * d + 2 * s * d * d + 2 * n * s * d
    self_attention = 4 * sequence * d * d + 2 * sequence * sequence * d
    mlp = 2 * sequence * d * MLP_RATIO * d
    block = self_attention + cross + mlp + 6 * d * d
    final = 2 * d * d + n * d * p * p * dit.out_channels
    final += t * h * w * dit.out_channels * (dit.n_codes or 0)
    # Patches and times are data: only the weights' gradient is taken of their products.
    once, twice = patches_in + time_in, embeddings + dit.depth * block + final
    return 2.0 * batch_size * (2 * once + 3 * twice)


def dit_parameters(dit: DiTConfig) -> int:
    """Number of parameters."""
    d, e, tokens = dit.width, dit.text_width, dit.patch**2

    def dense(n_in: int, n_out: int) -> int:
        return n_in * n_out + n_out

    attention = 4 * dense(d, d) + 2 * dit.head_size
    n_attentions = 1 if dit.text_mode == "in_context" else 2
    mlp = dense(d, MLP_RATIO * d) + dense(MLP_RATIO * d, d)
    block = n_attentions * attention + mlp + dense(d, 6 * d)
    time = dense(TIME_FEATURES, d) + dense(d, d)
    text = e + 2 * dense(e, d) + dense(d, d)
    final = dense(d, 2 * d) + dense(d, tokens * dit.out_channels)
    if dit.n_codes:
        final += dense(dit.out_channels, dit.n_codes)
    return dense(tokens * dit.in_channels, d) + time + text + dit.depth * block + final
