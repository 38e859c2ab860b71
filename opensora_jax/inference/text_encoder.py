"""Captions to CLIP text features."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from opensora_jax import files
from opensora_jax.convert import clip

BATCH_SIZE = 32
# A caption is padded to the first of these that holds it, or to the model's own length: most
# captions are short, and the time of the encoder is proportional to the padded length.
PADDED_LENGTHS = (16, 32)


class TextEncoder:
    """Captions to CLIP text features, one vector per token.

    Args:
      name_or_folder: a CLIP model on the Hugging Face hub (`openai/clip-vit-base-patch32`), or a
        folder in the hub layout with weights and tokenizer.
      dtype: compute dtype of the network.

    Attributes:
      name: `name_or_folder`.
      width: size of the features (D).
      max_length: the most tokens of one caption; a longer one is cut.

    Raises:
      FileNotFoundError: no such folder or hub name, or no tokenizer in it.
      ValueError: the weights are not CLIP's, or do not fit the tokenizer.
    """

    def __init__(self, name_or_folder: epath.PathLike, dtype: jnp.dtype = jnp.float32):
        self.name = str(name_or_folder)
        folder = clip.local_folder(name_or_folder)
        self._tokenizer = _load_tokenizer(folder)
        model = clip.load_clip_text(folder, dtype)
        if len(self._tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {len(self._tokenizer)} tokens, the model "
                f"embeddings for {model.config.vocab_size}"
            )
        self.width = model.config.width
        self.max_length = model.config.max_length
        graph, self._weights = nnx.split(model)
        self._apply = jax.jit(lambda weights, *inputs: nnx.merge(graph, weights)(*inputs))

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """The features of each caption, which depend on that caption alone.

        The shapes of the computation are fixed (`BATCH_SIZE` captions at a time, padded to one of
        `PADDED_LENGTHS`), so that each is compiled once and a caption gets the same bits in any
        company.

        Args:
          captions: any number of strings; an empty one has a beginning and an end all the same.

        Returns:
          For each caption a float32 array (S_i, D): its S_i tokens, those of beginning and end
          included, without padding.

        Raises:
          TypeError: one string instead of a list.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions={captions!r}: expected a list of strings")
        if not captions:
            return []
        ids = self._tokenizer(list(captions), truncation=True, max_length=self.max_length).input_ids
        lengths = [*(n for n in PADDED_LENGTHS if n < self.max_length), self.max_length]
        padded = [next(n for n in lengths if n >= len(tokens)) for tokens in ids]
        features = [None] * len(ids)
        for length in sorted(set(padded)):
            members = [i for i, n in enumerate(padded) if n == length]
            for start in range(0, len(members), BATCH_SIZE):
                batch = members[start : start + BATCH_SIZE]
                input_ids = np.zeros((BATCH_SIZE, length), np.int32)
                mask = np.zeros((BATCH_SIZE, length), np.int32)
                for row, i in enumerate(batch):
                    input_ids[row, : len(ids[i])] = ids[i]
                    mask[row, : len(ids[i])] = 1
                out_BSD = np.asarray(self._apply(self._weights, input_ids, mask))
                for row, i in enumerate(batch):
                    features[i] = out_BSD[row, : len(ids[i])].copy()
        return features


def check_text_model(name_or_folder: epath.PathLike) -> None:
    """Looks whether `TextEncoder` can find its files, without reading weights or downloading.

    Raises:
      FileNotFoundError, ValueError: as `TextEncoder`.
    """
    clip.check_text_model(name_or_folder)
    folder = epath.Path(name_or_folder)
    if folder.is_dir():
        _expect_tokenizer(folder)


def _load_tokenizer(folder: Path) -> Any:
    # transformers announces at import that there is no PyTorch; we want none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    _expect_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the library behind it has no narrower one for a file that is bad
        reason = files.short(f"{type(error).__name__}: {error}")
        raise ValueError(f"{folder}: its tokenizer cannot be read: {reason}") from error


def _expect_tokenizer(folder: epath.PathLike) -> None:
    folder = epath.Path(folder)
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"
        )
