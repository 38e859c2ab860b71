"""Text to video files.

    python -m opensora_jax.sample --workdir=runs/quickstart \\
        --prompt "a blue square moves up" --output out.mp4

Draws videos for prompts with the averaged weights of a trained DiT. Of one with
dit.conditioning=frames they may begin with an image, or go on with a video:

    python -m opensora_jax.sample --workdir=runs/frames --prompt "a blue square moves up" \\
        --init_image square.png --output out.mp4
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath

from opensora_jax import cli, files
from opensora_jax.diffusion.sampling import Sampling

# For models whose checkpoints say nothing of `config.sample`.
DEFAULTS = dataclasses.asdict(Sampling())


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    prompts = (args.prompt or []) + _read_prompts(args.prompts_file)
    if not prompts:
        raise ValueError("--prompt: expected at least one, here or in --prompts_file")
    init = _init(args)
    outputs = _outputs(epath.Path(args.output), len(prompts))

    # After the arguments are known to be good: these imports take seconds.
    import jax

    from opensora_jax import runtime
    from opensora_jax.data import video_io
    from opensora_jax.inference import frames
    from opensora_jax.inference.generator import Generator

    runtime.start()
    folder = _dit_folder(files.absolute(args.workdir))
    generator = Generator.load(folder)
    canvas = frames.Canvas(generator, args.frames, args.height, args.width)
    if init is not None:
        how = {"n_frames": 1} if args.init_image else {"fps": generator.fps}
        if args.keep[0] in ("first", "every"):  # no more than is looked at
            how = {"n_frames": canvas.shape[0], **how}
        with files.nearby(init) as path:
            video = video_io.read_video(path, resolution=canvas.shape[1:], **how)
        canvas.keep(
            frames.Given(str(init), video[None], *args.keep, is_image=bool(args.init_image))
        )
    videos = canvas.draw(
        prompts,
        params=generator.restore(folder, best=args.best),
        sampling=Sampling(**_settings(args, folder)),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    if jax.process_index():
        return  # the first one writes
    for output, prompt, video in zip(outputs, prompts, videos, strict=True):
        with files.local(output) as path:
            video_io.write_video(path, video, args.fps or generator.fps)
        print(f"{output}: {prompt}")
    where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{len(videos)} video(s) of shape {videos.shape[1:]} on {where}")


def _read_prompts(path: str | None) -> list[str]:
    """One a line; blank lines are none."""
    if path is None:
        return []
    try:
        text = epath.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompts_file={path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _init(args: argparse.Namespace) -> epath.Path | None:
    """The file whose frames are kept, if there is one.

    Raises:
      ValueError: two files, or none to keep frames of.
      FileNotFoundError: there is none.
    """
    if args.init_video and args.init_image:
        raise ValueError("--init_image: expected no --init_video beside it")
    name = "--init_video" if args.init_video else "--init_image"
    init = args.init_video or args.init_image
    if not init:
        if args.keep is not None:
            raise ValueError("--keep: expected --init_video or --init_image beside it")
        return None
    args.keep = args.keep or ("first", 1)
    if not epath.Path(init).is_file():
        raise FileNotFoundError(f"{name}={init}: no such file")
    return epath.Path(init)


def _keep(text: str) -> tuple[str, int]:
    """Which latent frames are kept: "first", "last" or "ends", ":" and how many, or "every:N"."""
    kept, colon, n = text.partition(":")
    n = n if colon or kept == "every" else "1"
    least = {"first": 1, "last": 1, "ends": 1, "every": 2}.get(kept)
    if least is None or not n.isdecimal() or int(n) < least:
        raise argparse.ArgumentTypeError(
            f"{text}: expected first, last or ends, also with a number as in first:2, or every:N "
            "with an N of 2 or more"
        )
    return kept, int(n)


def _outputs(output: epath.Path, n: int) -> list[epath.Path]:
    """One file, or for several prompts name-00.mp4, name-01.mp4, ...; their folder is there.

    Raises:
      ValueError: another suffix.
      OSError: the files cannot be written.
    """
    if output.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--output={output}: expected a name that ends in .mp4 or .gif")
    outputs = [output]
    if n > 1:
        outputs = [output.with_name(f"{output.stem}-{i:02d}{output.suffix}") for i in range(n)]
    for path in outputs:
        if path.is_dir():
            raise IsADirectoryError(f"--output={path}: a folder, expected the name of a file")
    if not files.is_remote(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Whether they can be written: like this one, videos have a longer name at first.
        with tempfile.NamedTemporaryFile(dir=output.parent, prefix=f".{outputs[-1].name}."):
            pass
    return outputs


def _dit_folder(workdir: epath.Path) -> epath.Path:
    """Where the DiT lies.

    Raises:
      FileNotFoundError: not in this workdir.
      ValueError: what lies there is something else.
    """
    from opensora_jax.checkpoint import manager as checkpoint

    folder = workdir / "dit"
    if (folder / checkpoint.MODEL_FILE).exists():
        if "dit" not in checkpoint.read_model(folder):
            raise ValueError(f"{folder}: holds another model than a DiT")
        return folder
    if not workdir.exists():
        raise FileNotFoundError(f"--workdir={workdir}: no such folder")
    if workdir.name == "dit" and (workdir / checkpoint.MODEL_FILE).exists():
        raise FileNotFoundError(f"--workdir={workdir}: did you mean {workdir.parent}?")
    raise FileNotFoundError(f"--workdir={workdir}: no DiT was trained here")


def _settings(args: argparse.Namespace, folder: epath.Path) -> dict[str, Any]:
    """Those of `DEFAULTS`: as given, or else as the DiT in `folder` was trained with."""
    from opensora_jax.checkpoint import manager as checkpoint

    trained = {**DEFAULTS, **checkpoint.read_config(folder).get("sample", {})}
    if trained.get("ancestral"):  # as it was called before there were more samplers
        trained["sampler"] = "ancestral"
    given = {name: getattr(args, name) for name in DEFAULTS}
    return {name: trained[name] if value is None else value for name, value in given.items()}


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, prog="python -m opensora_jax.sample")
    add = parser.add_argument
    add("--workdir", required=True, help="the workdir that the DiT was trained in")
    add("--prompt", action="append", help="what to show; may be given several times")
    add("--prompts_file", help="a text file with one prompt a line")
    add("--output", default="out.mp4", help=".mp4 or .gif; several prompts are numbered")
    add("--best", action="store_true", help="weights of the lowest validation loss, not the last")
    add(
        "--steps",
        type=cli.number(int, 1),
        help=f"steps from noise to video {_trained('steps')}",
    )
    add(
        "--guidance",
        type=cli.number(float, 0.01, 1000),
        help=f"guidance scale; 1 is off {_trained('guidance')}",
    )
    add(
        "--guidance_from",
        type=cli.number(float, 0, 1),
        help=f"noise level from which on there is guidance, 0: data {_trained('guidance_from')}",
    )
    add(
        "--guidance_to",
        type=cli.number(float, 0, 1),
        help=f"and up to which, 1: noise {_trained('guidance_to')}",
    )
    add(
        "--guidance_rescale",
        type=cli.number(float, 0, 1),
        help="share to which guided outputs keep the others' deviation "
        f"{_trained('guidance_rescale')}",
    )
    add(
        "--sampler",
        help="euler, heun or dpm++; of ddpm models ddim, ancestral or dpm++; auto: the first "
        f"{_trained('sampler')}",
    )
    add(
        "--eta",
        type=cli.number(float, 0, 1),
        help=f"of ddim: share of the noise that each step draws anew {_trained('eta')}",
    )
    add(
        "--temperature",
        type=cli.number(float, 0.01, 100),
        help="of masked and metric models: what logits of codes are divided by "
        f"{_trained('temperature')}",
    )
    add(
        "--top_p",
        type=cli.number(float, 0.01, 1),
        help="of these: share of the probability that the codes hold of which one is drawn "
        f"{_trained('top_p')}",
    )
    add(
        "--choice_temperature",
        type=cli.number(float, 0, 1000),
        help="of masked models: chance in which codes are kept first "
        f"{_trained('choice_temperature')}",
    )
    seed_help = "of the noise; the same seed gives the same bytes"
    add("--seed", type=cli.number(int, 0, 2**32 - 1), default=1, help=seed_help)
    add(
        "--frames",
        type=cli.number(int, 1),
        help="frames of a video, with dit.conditioning=frames also more than in training (default: "
        "as in training)",
    )
    add("--init_video", help="a video of which frames are kept (dit.conditioning=frames)")
    add("--init_image", help="or an image, as a video in which nothing moves")
    add(
        "--keep",
        type=_keep,
        help="which of its latent frames, at the same places: first, last, ends (first:2 are two) "
        "or every:4 (default: first)",
    )
    add("--height", type=cli.number(int, 1), help="pixels (default: as in training)")
    add("--width", type=cli.number(int, 1), help="pixels (default: as in training)")
    add(
        "--fps",
        type=cli.number(float, 0.01, 1000),
        help="frames a second (default: as in training)",
    )
    add("--batch_size", type=cli.number(int, 1), default=16, help="videos drawn at once")
    return parser


def _trained(name: str) -> str:
    return f"(default: the training's sample.{name}, or {DEFAULTS[name]} if unknown)"


if __name__ == "__main__":
    cli.run(main)
