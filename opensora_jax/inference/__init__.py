"""Frozen tokenizers and text encoders, and the generator that makes videos of prompts."""
