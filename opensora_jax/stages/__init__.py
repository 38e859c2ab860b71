"""What `opensora_jax.main` runs, one module a stage."""
