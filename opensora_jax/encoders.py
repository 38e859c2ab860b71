"""The frozen encoders that preprocessing, sampling and evaluation share."""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from opensora_jax.convert import clip, videogpt
from opensora_jax.models.vqvae import VQVAE
from opensora_jax.tasks.vqvae import VQVAETask, to_uint8
from opensora_jax.train import checkpoint

BATCH_SIZE = 32
# A caption is padded to the first of these that holds it, or to the model's own length: most
# captions are short, and the time of the encoder is proportional to the padded length.
PADDED_LENGTHS = (16, 32)


def load_vqvae(path: str | Path) -> VQVAE:
    """The VQ-VAE of a training or imported folder, or of a VideoGPT checkpoint file.

    Returns:
      The model in evaluation mode, with averaged weights.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: a file that is no such checkpoint.
    """
    path = Path(path)
    if path.is_file():
        return videogpt.load_videogpt(path)
    arguments = checkpoint.read_description(path)
    task = VQVAETask(lambda rngs: VQVAE(**arguments, rngs=rngs))
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        {"ema": params, "extra": extra},
    )
    restored = checkpoint.restore_items(path, like)
    return task.model(restored["ema"], restored["extra"])


def save_vqvae(folder: str | Path, model: VQVAE) -> None:
    """Writes `model` so that `load_vqvae` reads it from `folder`.

    Raises:
      ValueError: if the folder holds another model.
    """
    checkpoint.claim(folder, model.arguments)
    _, params, extra = nnx.split(model, nnx.Param, ...)
    params, extra = nnx.to_pure_dict(params), nnx.to_pure_dict(extra)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save_items(0, {"ema": params, "extra": extra})
    checkpoints.close()


def decode(model: VQVAE, codes: jax.Array) -> np.ndarray:
    """Codes (B, t, h, w) -> videos uint8 (B, T, H, W, 3), in windows of the trained length.

    The mirror of how preprocessing encodes: a last, partial window is filled up with its last
    codes, and their frames are dropped.
    """
    window = max(model.n_frames // model.downsample[0], 1)
    n = codes.shape[1]
    graph, state = nnx.split(model)
    pieces = []
    for start in range(0, n, window):
        index = np.minimum(np.arange(start, start + window), n - 1)
        pieces.append(np.asarray(_decode_window(graph, state, codes[:, index])))
    return np.concatenate(pieces, axis=1)[:, : n * model.downsample[0]]


@functools.partial(jax.jit, static_argnums=0)
def _decode_window(graph, state, codes):
    return to_uint8(nnx.merge(graph, state).decode(codes))


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

    def __init__(self, name_or_folder: str | Path, dtype: jnp.dtype = jnp.float32):
        self.name = str(name_or_folder)
        folder = clip.local_folder(name_or_folder)
        self._tokenizer = _load_tokenizer(folder)
        model = clip.load_clip_text(folder, dtype)
        if len(self._tokenizer) > model.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {len(self._tokenizer)} tokens, the model "
                f"embeddings for {model.vocab_size}"
            )
        self.width = model.width
        self.max_length = model.max_length
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


def _load_tokenizer(folder: Path):
    # transformers announces at import that there is no PyTorch; we want none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"
        )
    return AutoTokenizer.from_pretrained(str(folder))


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
    n_heads: int = 4,
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
        width, depth, n_heads: size of the encoder; its MLPs are four times as wide.
        max_length: number of positions, beginning and end included.

    Raises:
        ValueError: no words in `captions`, a `width` that `n_heads` does not divide, or `folder`
            holds something else.
    """
    if width % n_heads:
        raise ValueError(f"width={width}: not divisible by n_heads={n_heads}")
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
        "num_attention_heads": n_heads,
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
        written = folder / "config.json"
        if not written.is_file() or json.loads(written.read_text()) != config:
            raise ValueError(f"{folder}: exists and holds something else; expected it to be absent")
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
