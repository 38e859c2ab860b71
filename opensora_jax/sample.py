"""Text to video files.

    python -m opensora_jax.sample --workdir=runs/quickstart \\
        --prompt "a blue square moves up" --output out.mp4
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    prompts = list(args.prompt)
    if args.prompts_file:
        lines = Path(args.prompts_file).read_text().splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SystemExit("--prompt: expected at least one prompt, here or in --prompts_file")
    outputs = _outputs(Path(args.output), len(prompts))

    # After the arguments are known to be good: these imports take seconds.
    import jax
    from etils import epath

    from opensora_jax import runtime
    from opensora_jax.data import video_io
    from opensora_jax.inference.generator import Generator

    runtime.keep_compiled_programs()
    folder = epath.Path(args.workdir) / "dit"
    generator = Generator.load(folder)
    grid = generator.latent_grid(args.frames, args.height, args.width)
    videos = generator.sample(
        prompts,
        params=generator.restore(folder, best=args.best),
        steps=args.steps,
        guidance=args.guidance,
        ancestral=args.ancestral,
        seed=args.seed,
        grid=grid,
        batch_size=args.batch_size,
    )
    for output, prompt, video in zip(outputs, prompts, videos, strict=True):
        output.parent.mkdir(parents=True, exist_ok=True)
        video_io.write_video(output, video, args.fps or generator.fps)
        print(f"{output}: {prompt}")
    print(f"{len(videos)} video(s) of shape {videos.shape[1:]} on {jax.devices()[0].platform}")


def _outputs(output: Path, n: int) -> list[Path]:
    """One file, or for several prompts name-00.mp4, name-01.mp4, ..."""
    if output.suffix not in (".mp4", ".gif"):
        raise SystemExit(f"--output={output}: expected a name that ends in .mp4 or .gif")
    if n == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i:02d}{output.suffix}") for i in range(n)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opensora_jax.sample",
        description="Draws videos for prompts with the averaged weights of a trained DiT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", required=True, help="the workdir that the DiT was trained in")
    add("--prompt", action="append", default=[], help="what to show; may be given several times")
    add("--prompts_file", help="a text file with one prompt a line")
    add("--output", default="out.mp4", help=".mp4 or .gif; several prompts are numbered")
    add("--best", action="store_true", help="weights of the lowest validation loss, not the last")
    add("--steps", type=_positive(int), default=30, help="steps from noise to video")
    add("--guidance", type=_positive(float), default=4.0, help="guidance scale; 1 is off")
    add("--ancestral", action="store_true", help="draw noise in each step; of ddpm models only")
    add("--seed", type=int, default=1, help="of the noise; the same seed gives the same bytes")
    add("--frames", type=_positive(int), help="frames of a video [as in training]")
    add("--height", type=_positive(int), help="pixels [as in training]")
    add("--width", type=_positive(int), help="pixels [as in training]")
    add("--fps", type=_positive(float), help="frames a second [as in training]")
    add("--batch_size", type=_positive(int), default=16, help="videos drawn at once")
    return parser


def _positive(kind):
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
        return value

    parse.__name__ = kind.__name__
    return parse


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
