"""Packaging of opensora_jax: `pip install -e .`, or with extras, as .[cuda,ray] has them."""

from setuptools import find_packages, setup

setup(
    name="opensora_jax",
    version="0.1.0",
    description="Text-to-video training and inference in JAX, from raw videos to samples",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["opensora_jax", "opensora_jax.*"]),
    package_data={"opensora_jax.report": ["templates/*"]},
    # What the package imports directly; lower bounds only where an older one is known not to do.
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax",
        "orbax-checkpoint",
        "grain",
        "etils[epath]",
        "fsspec",
        "ml-collections",
        "absl-py",
        "numpy",
        "scipy",
        "ml-dtypes",
        "datasets",
        "filelock",
        "pyarrow",
        "transformers>=4.57",
        "tokenizers",
        "huggingface-hub",
        "safetensors",
        "imageio[pyav]",
        "av",
        "tensorboard",
        "matplotlib",
        "jinja2",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]", "etils[epath-gcs]"],  # gs:// paths
        "cuda": ["jax[cuda13]"],
        "ray": ["ray[data]"],  # preprocessing on many machines
        "tfds": ["tensorflow-datasets", "array_record"],  # without TensorFlow
        "scenes": ["scenedetect-headless>=0.7"],  # preprocessing that cuts at scene changes
        "web": ["aiohttp"],  # https:// addresses of captions and videos
        "test": [
            "ray[data]",
            "tensorflow-datasets",
            "array_record",
            "scenedetect-headless>=0.7",
            "aiohttp",
            "moto[server]",
            "s3fs",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
    },
)
