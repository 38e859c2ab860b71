"""A small, random text encoder in the hub layout: nothing to download."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from opensora_jax import files

SPECIAL_TOKENS = {
    "pad_token": "<|pad|>",
    "unk_token": "<|unknown|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
}


def make_small_text_model(
    folder: str | Path,
    captions: Iterable[str],
    *,
    seed: int = 0,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    max_length: int = 32,
) -> None:
    """Write a small, random text encoder that knows the words of `captions`: nothing to download.

    Random features of this kind are enough to train on, as long as they tell words and their order
    apart; see `_random_weights`. The folder is in the hub layout, as `TextEncoder` reads it. It
    appears whole, and the same arguments write the same model; where it exists already, nothing
    happens.

    Args:
      folder: where to write.
      captions: texts whose lower-cased words become the vocabulary; any other word is encoded as
        the unknown one.
      seed: of the weights.
      width, depth, heads: size of the encoder; its MLPs are four times as wide.
      max_length: number of positions, beginning and end included.

    Raises:
      ValueError: no words in `captions`, a `width` that `heads` does not divide, or `folder`
        holds something else.
    """
    if width % heads:
        raise ValueError(f"width={width}: not divisible by heads={heads}")
    folder = Path(folder)
    split = re.compile(r"\w+|[^\w\s]+")  # as the tokenizer's Whitespace splits
    words = sorted({word for text in captions for word in split.findall(text.lower())})
    if not words:
        raise ValueError("captions: no words in them, expected some to make a vocabulary of")
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *words])}
    recipe = {"seed": seed, "words": hashlib.sha256(" ".join(words).encode()).hexdigest()}
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": max_length,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary[SPECIAL_TOKENS["bos_token"]],
        "eos_token_id": vocabulary[SPECIAL_TOKENS["eos_token"]],
        "pad_token_id": vocabulary[SPECIAL_TOKENS["pad_token"]],
        "small_text_model": recipe,
    }
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: exists and holds something else; expected it to be absent")
        files.expect_settings(
            folder / "config.json", config, files.read_json(folder / "config.json")
        )
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_tokenizer(temporary, vocabulary, max_length)
    weights = _random_weights(np.random.default_rng(seed), config)
    save_file(weights, temporary / "model.safetensors")
    (temporary / "config.json").write_text(json.dumps(config, indent=2))
    temporary.rename(folder)


def _write_tokenizer(folder: Path, vocabulary: dict[str, int], max_length: int) -> None:
    bos, eos = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(t, vocabulary[t]) for t in (bos, eos)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _random_weights(rng: np.random.Generator, config: dict) -> dict[str, np.ndarray]:
    """CLIP's tensors with scales chosen for features that are never trained.

    Unit token embeddings over position embeddings of 0.5: the residual stream carries both to the
    end, where a linear map still reads the word and its place. Dense layers keep the variance of
    their input (1 / sqrt(fan in)), so attention adds an average of the words so far and the MLPs
    bind words to places, each as large as a few tenths of the stream: the last token then tells
    whole captions apart, their order too. CLIP's own scales (0.02) are made for training: with
    them, blocks add next to nothing.
    """
    width, mlp_width = config["hidden_size"], config["intermediate_size"]

    def normal(scale, *shape):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def dense(name, n_in, n_out):
        weight = normal(n_in**-0.5, n_out, n_in)
        return {f"{name}.weight": weight, f"{name}.bias": np.zeros(n_out, np.float32)}

    def norm(name):
        return {
            f"{name}.weight": np.ones(width, np.float32),
            f"{name}.bias": np.zeros(width, np.float32),
        }

    weights = {
        "embeddings.token_embedding.weight": normal(1.0, config["vocab_size"], width),
        "embeddings.position_embedding.weight": normal(
            0.5, config["max_position_embeddings"], width
        ),
        **norm("final_layer_norm"),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{layer}"
        weights |= norm(f"{block}.layer_norm1") | norm(f"{block}.layer_norm2")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= dense(f"{block}.self_attn.{projection}", width, width)
        weights |= dense(f"{block}.mlp.fc1", width, mlp_width)
        weights |= dense(f"{block}.mlp.fc2", mlp_width, width)
    return {f"text_model.{name}": x for name, x in weights.items()}
