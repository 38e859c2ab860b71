"""CLIP text weights, as Hugging Face hubs keep them, to `models.clip_text.ClipText`."""

from collections.abc import Mapping
from pathlib import Path

import flax.serialization
import flax.traverse_util
import huggingface_hub
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from huggingface_hub.utils import validate_repo_id

from opensora_jax import files
from opensora_jax.convert import table, torch_file
from opensora_jax.files import short
from opensora_jax.models.clip_text import ACTIVATIONS, ClipText, ClipTextConfig

# What transformers' CLIPTextConfig assumes where config.json says nothing.
CONFIG_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# The largest number in a config.json that is no mistake, and that of layers, which are one by one.
MOST = 10**6
MOST_LAYERS = 1000


def _linear(theirs: str, ours: str) -> list[table.Row]:
    """A torch linear layer of every block: its weight is (out, in), ours (in, out)."""
    return [
        (f"encoder.layers.#.{theirs}.weight", f"blocks.{ours}.kernel", (1, 0)),
        (f"encoder.layers.#.{theirs}.bias", f"blocks.{ours}.bias", None),
    ]


TABLE: list[table.Row] = [
    ("embeddings.token_embedding.weight", "token_embedding.embedding", None),
    ("embeddings.position_embedding.weight", "position_embedding.embedding", None),
    ("encoder.layers.#.layer_norm1.weight", "blocks.attention_norm.scale", None),
    ("encoder.layers.#.layer_norm1.bias", "blocks.attention_norm.bias", None),
    *_linear("self_attn.q_proj", "query"),
    *_linear("self_attn.k_proj", "key"),
    *_linear("self_attn.v_proj", "value"),
    *_linear("self_attn.out_proj", "attention_out"),
    ("encoder.layers.#.layer_norm2.weight", "blocks.mlp_norm.scale", None),
    ("encoder.layers.#.layer_norm2.bias", "blocks.mlp_norm.bias", None),
    *_linear("mlp.fc1", "mlp_in"),
    *_linear("mlp.fc2", "mlp_out"),
    ("final_layer_norm.weight", "final_norm.scale", None),
    ("final_layer_norm.bias", "final_norm.bias", None),
]
# The other half of a whole CLIPModel, projections, and a buffer of older transformers.
IGNORED = (
    r"(vision_model|visual_projection|text_projection)\..*|logit_scale|"
    r"(text_model\.)?embeddings\.position_ids"
)


def load_clip_text(name_or_folder: epath.PathLike, dtype: jnp.dtype = jnp.float32) -> ClipText:
    """The text encoder of a CLIP checkpoint.

    Args:
      name_or_folder: a folder in the hub layout, or a model's name on the Hugging Face hub:
        `config.json` of a CLIPModel, CLIPTextModel or CLIPTextModelWithProjection beside
        `model.safetensors`, `flax_model.msgpack` or `pytorch_model.bin` (the first that is
        there; a sharded one with its `.index.json` too).
      dtype: compute dtype; parameters are float32.

    Returns:
      model(input_ids, attention_mask) -> last_hidden_state (B, S, D).

    Raises:
      FileNotFoundError: no such folder or hub name, no config or weights in it.
      ValueError: another kind of model, or a missing, unexpected or misshapen weight.
    """
    folder = local_folder(name_or_folder)
    config = _text_config(folder / "config.json")

    config = ClipTextConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        activation=config["hidden_act"],
        norm_epsilon=config["layer_norm_eps"],
    )
    tensors = _weights(folder)
    # Text-only checkpoints of transformers 5 have no such prefix.
    prefix = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    rows = [(prefix + theirs, ours, axes) for theirs, ours, axes in TABLE]
    return table.fill(
        lambda: ClipText(config, rngs=nnx.Rngs(0), dtype=dtype),
        tensors,
        rows,
        source=str(folder),
        ignored=IGNORED,
    )


def local_folder(name_or_folder: epath.PathLike) -> Path:
    """The folder itself, or the local copy of an object store's or of a hub model.

    What is not there yet is copied or downloaded.

    Raises:
      FileNotFoundError: neither a folder nor a model the hub gives us.
    """
    if files.is_remote(name_or_folder):
        return files.fetch(name_or_folder, "config.json")
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    name = str(name_or_folder)
    try:
        for weights in ("model*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin"):
            patterns = ["*.json", "merges.txt", weights]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except (OSError, ValueError) as error:  # network, unknown name, malformed name
        raise FileNotFoundError(
            f"text model {short(name)}: no such folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {error}). Check the name and the network, or download it "
            "elsewhere and give the folder that holds its config.json"
        ) from error
    return folder


def check_text_model(name_or_folder: epath.PathLike) -> None:
    """Looks whether a folder holds a model's config; of a hub name only at its form.

    Raises:
      FileNotFoundError: neither a folder nor a name that the hub can have, or no config in it.
      ValueError: the config is not CLIP's.
    """
    path = epath.Path(name_or_folder)
    if files.is_remote(path) or path.is_dir():
        _text_config(path / "config.json")
        return
    try:
        validate_repo_id(str(name_or_folder))
    except ValueError as error:
        raise FileNotFoundError(f"{path}: no such folder, and no name on the hub") from error
    if path.exists():
        raise NotADirectoryError(f"{path}: a file, expected a folder with a CLIP model")


def _text_config(path: epath.PathLike) -> dict:
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected the config of a CLIP model")
    config = files.read_json(path)
    if config.get("model_type") not in ("clip", "clip_text_model"):
        raise ValueError(
            f"{path}: model_type={short(config.get('model_type'))}, expected 'clip' or "
            "'clip_text_model'"
        )
    if config["model_type"] == "clip":
        # Old files repeat the text settings under text_config_dict, which then has precedence.
        parts = {key: config.get(key) or {} for key in ("text_config", "text_config_dict")}
        for key, part in parts.items():
            if not isinstance(part, dict):
                raise ValueError(f"{path}: {key}={short(part)}, expected an object")
        config = {**parts["text_config"], **parts["text_config_dict"]}
    config = {**CONFIG_DEFAULTS, **config}
    for key, default in CONFIG_DEFAULTS.items():
        value, most = config[key], MOST_LAYERS if key == "num_hidden_layers" else MOST
        if type(value) is not type(default) or (type(value) is not str and not 0 < value <= most):
            raise ValueError(f"{path}: {key}={short(value)}, expected something like {default!r}")
    if config["hidden_act"] not in ACTIVATIONS:
        found = short(config["hidden_act"])
        raise ValueError(f"{path}: hidden_act={found}, expected one of {', '.join(ACTIVATIONS)}")
    return config


def _weights(folder: Path) -> Mapping[str, np.ndarray]:
    """Tensors by their PyTorch name, from the first format that the folder holds."""
    readers = {
        "model.safetensors": torch_file.load,
        "flax_model.msgpack": _load_flax,
        "pytorch_model.bin": torch_file.load,
    }
    for name, read in readers.items():
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            shards = _shards(index)
            return {key: x for shard in shards for key, x in read(shard).items()}
    raise FileNotFoundError(f"{folder}: no weights; expected one of {', '.join(readers)}")


def _shards(index: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names, which lie beside it."""
    weight_map = files.read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or len(name) > 255:
            raise ValueError(f"{index}: weight_map names {short(name)}, expected files beside it")
    shards = [index.parent / name for name in sorted(set(names))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index}: {short(missing[0])} is not beside it, one of {len(missing):,} missing files"
        )
    return shards


def _load_flax(path: Path) -> dict[str, np.ndarray]:
    """A Flax checkpoint under PyTorch's names, and in its layout (kernels are transposed)."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        if not isinstance(tree, dict):
            raise TypeError(f"holds {type(tree).__name__} where a dict is expected")
        leaves = flax.traverse_util.flatten_dict(tree)
    # What flax's reader stumbles over where the bytes are not those of a tree of arrays.
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = short(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path}: corrupt or truncated ({reason})") from error
    tensors = {}
    for (*scope, leaf), x in leaves.items():
        named = all(isinstance(key, str) for key in (*scope, leaf))
        if not named or not isinstance(x, np.ndarray | np.generic):
            where = ".".join(map(str, (*scope, leaf)))
            raise ValueError(f"{path}: {short(where)}: expected an array, by names")
        name = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
        tensors[".".join([*scope, name])] = x.T if leaf == "kernel" else x
    return tensors
