"""Text-to-video training and inference in JAX."""
