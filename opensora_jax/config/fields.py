"""What each field of a configuration may hold: `RULES`."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opensora_jax import mesh as mesh_lib
from opensora_jax.config.stages import STAGES
from opensora_jax.data import buckets
from opensora_jax.diffusion.objectives import OBJECTIVES, PREDICTIONS
from opensora_jax.diffusion.on_codes import CODE_HEADS
from opensora_jax.models import attention, dit
from opensora_jax.tasks.vqvae import ARCHITECTURES
from opensora_jax.train.optim import OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may hold: a test of any value, and the same in words."""

    test: Callable[[Any], bool]
    expected: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def at_least(low: int) -> Rule:
    return Rule(lambda v: _is_whole(v) and v >= low, f"an integer of at least {low}")


def one_of(names: Sequence[str]) -> Rule:
    known = ", ".join(name or "empty" for name in names)
    return Rule(lambda v: isinstance(v, str) and v in names, f"one of {known}")


def auto_or(rule: Rule) -> Rule:
    return Rule(lambda v: v == "auto" or rule.test(v), f"auto, or {rule.expected}")


def one_or_several(rule: Rule) -> Rule:
    return Rule(
        lambda v: (
            rule.test(v)
            or (
                _is_sequence(v) and len(v) == len(set(v)) > 0 and all(n and rule.test(n) for n in v)
            )
        ),
        f"{rule.expected}, or several, each once",
    )


positive = Rule(lambda v: _is_number(v) and v > 0, "a positive number")
not_negative = Rule(lambda v: _is_number(v) and v >= 0, "zero or a positive number")
share = Rule(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
# `data.video_io.check_fps` with its bounds, which would have to be imported with the decoders.
frame_rate = Rule(lambda v: _is_number(v) and 0.01 <= v <= 1000, "0.01 to 1000 frames a second")
below_one = Rule(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
even = Rule(lambda v: _is_whole(v) and v >= 2 and v % 2 == 0, "an even number of at least 2")
true_or_false = Rule(lambda v: isinstance(v, bool), "True or False")
text = Rule(lambda v: isinstance(v, str), "a text, or empty")
# Their sizes are `mesh.make_mesh`'s to check.
mesh_size = Rule(_is_whole, "an integer")
stages = Rule(
    lambda v: _is_sequence(v) and len(v) > 0 and list(v) == [name for name in STAGES if name in v],
    f"some of {', '.join(STAGES)}, each once and in this order",
)
steps_from_to = Rule(
    lambda v: (
        _is_sequence(v)
        and all(map(_is_whole, v))
        and (len(v) == 0 or (len(v) == 2 and 1 <= v[0] <= v[1]))
    ),
    "(), or two steps, the first and the last",
)


def whole_numbers(low: int) -> Rule:
    return Rule(
        lambda v: _is_sequence(v) and len(v) > 0 and all(_is_whole(n) and n >= low for n in v),
        f"integers of at least {low}",
    )


strides = Rule(
    lambda v: (
        _is_sequence(v)
        and len(v) == 3
        and all(_is_whole(n) and n >= 1 and not n & (n - 1) for n in v)
        and max(v) > 1
    ),
    "three powers of two, one of them above 1",
)
prompts = Rule(
    lambda v: _is_sequence(v) and all(isinstance(p, str) and p.strip() for p in v),
    "texts that are not blank",
)


def _are_buckets(value: Any) -> bool:
    try:
        return value in ("", buckets.AUTO) or bool(buckets.parse(value))
    except (ValueError, AttributeError):  # of what is no text
        return False


def _is_side(value: Any) -> bool:
    """Of a made video."""
    return even.test(value) and value >= 16


def _are_made_sizes(value: Any) -> bool:
    if not _are_buckets(value) or value == buckets.AUTO:
        return False
    sizes = buckets.parse(value) if value else ()
    return all(s.n_frames >= 2 and _is_side(s.height) and _is_side(s.width) for s in sizes)


bucket_sizes = Rule(
    _are_buckets, "auto, or sizes of frames x height x width, as 16x96x160,1x128x128, or empty"
)

_TRAINING = {
    "batch_size": at_least(1),
    "accumulate": at_least(1),
    "steps": at_least(1),
    "learning_rate": positive,
    "warmup_steps": at_least(0),
    "b1": below_one,
    "b2": below_one,
    "weight_decay": not_negative,
    "clip_norm": positive,
    "ema_decay": below_one,
    "dtype": one_of(("auto", "float32", "bfloat16")),
    "log_every": at_least(1),
    "eval_every": at_least(1),
    "checkpoint_every": at_least(1),
    "keep_checkpoints": at_least(1),
    "keep_every": at_least(0),
    "max_skipped_steps": at_least(1),
}

# Every field of a configuration; there are no others.
_SAMPLERS = dict.fromkeys(name for kind in OBJECTIVES.values() for name in kind.samplers)

RULES: Mapping[str, Rule | Mapping[str, Rule]] = {
    "seed": at_least(0),
    "stages": stages,
    "profile": steps_from_to,
    "data": {
        "captions": text,
        "videos": text,
        "held_out_videos": text,
        "images": text,
        "file_column": text,
        "caption_column": text,
        "workers": at_least(0),
        "dataset": text,
        "stream": true_or_false,
        "cache_gb": not_negative,
        "cache_dir": Rule(
            lambda v: text.test(v) and "://" not in v, "a folder of this machine's, or empty"
        ),
        "vqvae": text,
        "text_model": text,
    },
    "mesh": {
        **dict.fromkeys(mesh_lib.AXES, mesh_size),
        "reduce_dtype": one_of(("auto", "float32")),
    },
    "shapes": {
        "world": one_of(("single", "scenes")),
        "n_videos": at_least(1),
        "n_held_out": at_least(1),
        "n_frames": at_least(2),
        "resolution": Rule(_is_side, "16 or more, even"),
        "sizes": Rule(
            _are_made_sizes,
            "sizes of frames x height x width, as 16x64x64,24x48x72, of 2 frames or more and even "
            "sides of 16 or more, or empty",
        ),
        "fps": frame_rate,
        "n_captions": Rule(lambda v: _is_whole(v) and 1 <= v <= 10, "1 to 10"),
    },
    "vqvae": _TRAINING
    | {
        "architecture": one_of(tuple(ARCHITECTURES)),
        "quantizer": one_of(("vq", "fsq")),
        "levels": whole_numbers(2),
        "multipliers": whole_numbers(1),
        "patch": at_least(1),
        "distance": one_of(("l2", "l1")),
        "perceptual": text,
        "perceptual_weight": positive,
        "adversarial": not_negative,
        "adversarial_from": share,
        "adversarial_width": at_least(1),
        "init_from": text,
        "train": one_of(("all", "decoder")),
        "n_codes": at_least(2),
        "embedding_dim": at_least(1),
        "n_hiddens": even,  # for two heads of attention
        "n_res_layers": at_least(0),
        "downsample": strides,
        "normalize_latents": true_or_false,
        "n_frames": at_least(1),
        "resolution": at_least(1),
        "still_share": below_one,
        "fps": Rule(lambda v: v == 0 or frame_rate.test(v), f"0, or {frame_rate.expected}"),
        "end_weight": positive,
        "quantize_from": share,
        "quantize_to": share,
    },
    "preprocess": {
        "resolution": one_or_several(at_least(1)),
        "buckets": bucket_sizes,
        "bucket_tokens": at_least(1),
        "fps": Rule(lambda v: v == 0 or frame_rate.test(v), f"0, or {frame_rate.expected}"),
        "max_frames": at_least(0),
        "n_frames": at_least(0),
        "clip_frames": at_least(0),
        "clip_stride": at_least(0),
        "window": at_least(0),
        "tile": at_least(0),
        "batch_size": at_least(1),
        "videos_per_part": at_least(1),
        "flat": true_or_false,
        "strict": true_or_false,
        "split_scenes": true_or_false,
        "crop_bars": true_or_false,
        "video_timeout": not_negative,
        "min_side": at_least(0),
        "min_motion": not_negative,
        "min_brightness": not_negative,
        "max_frozen": share,
        "near_duplicates": at_least(0),
    },
    "dit": _TRAINING
    | {
        "size": one_of(("", *dit.SIZES)),
        "depth": at_least(0),
        "width": at_least(0),
        "heads": at_least(0),
        "init_from": text,
        "components": auto_or(at_least(0)),
        "patch": at_least(1),
        "text_mode": one_of(dit.TEXT_MODES),
        "conditioning": one_of(dit.CONDITIONINGS),
        "text_length": at_least(0),
        "n_latent_frames": one_or_several(at_least(0)),
        "caption_dropout": share,
        "objective": one_of(tuple(OBJECTIVES)),
        "prediction": one_of(("auto", *PREDICTIONS)),
        "time_shift": auto_or(positive),
        "code_head": one_of(CODE_HEADS),
        "beta_scale": positive,
        "beta_power": positive,
        "validation_share": below_one,
        "optimizer": one_of(OPTIMIZERS),
        "attention": one_of(("auto", *attention.BACKENDS)),
        "remat": one_of(tuple(dit.REMAT_POLICIES)),
        "unroll": at_least(1),
    },
    "bench": {"text_width": at_least(1)},
    "sample": {
        "steps": at_least(1),
        "sampler": one_of(("auto", *_SAMPLERS)),
        "eta": share,
        "guidance": positive,
        "guidance_from": share,
        "guidance_to": share,
        "guidance_rescale": share,
        "temperature": positive,
        "top_p": Rule(lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1"),
        "choice_temperature": not_negative,
        "prompts": prompts,
    },
    "fidelity": {"n_samples": at_least(1), "batch_size": at_least(1)},
}
