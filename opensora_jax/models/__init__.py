"""Networks (Flax NNX): VQ-VAE, CLIP text encoder, Diffusion Transformer."""
