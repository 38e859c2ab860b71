"""Writes a folder of captioned moving shapes: real video files to train on and to try things with.

python data_prep/moving_shapes.py -o shapes --n_videos 1000
"""

from opensora_jax import cli
from opensora_jax.data import buckets, moving_shapes, scenes

COMBINATIONS = {
    "all": moving_shapes.ALL,
    "seen": moving_shapes.SEEN,
    "held_out": moving_shapes.HELD_OUT,
}


def main() -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("-o", "--output_dir", required=True, help="gets videos/ and captions.json")
    add("--n_videos", type=int, default=1000, help="number of videos")
    add(
        "--world",
        choices=("single", "scenes"),
        default="single",
        help="one shape that moves, or scenes of more (of 16 frames and 48 pixels at least)",
    )
    add(
        "--combinations",
        choices=COMBINATIONS,
        default="all",
        help="all, or what the configurations train on (seen), or do not (held_out)",
    )
    add("--seed", type=int, default=0, help="decides everything that is drawn")
    add("--n_frames", type=int, help="frames a video; without it 8, of scenes 16")
    add("--resolution", type=int, help="height and width in pixels; without it 32, of scenes 64")
    add(
        "--sizes",
        default="",
        help="instead of these two, frames x height x width of several, as 16x64x64,24x48x72: of "
        "each video one is drawn",
    )
    add("--fps", type=float, default=8, help="frames a second")
    add("--n_captions", type=int, default=3, help="phrasings a video")
    args = vars(parser.parse_args())

    folder = args.pop("output_dir")
    world, split = args.pop("world"), args.pop("combinations")
    args["sizes"] = buckets.parse(args["sizes"]) if args["sizes"] else ()
    if not args["sizes"]:
        n_frames, resolution = (16, 64) if world == "scenes" else (8, 32)
        args["n_frames"] = n_frames if args["n_frames"] is None else args["n_frames"]
        args["resolution"] = resolution if args["resolution"] is None else args["resolution"]
    if world == "scenes":
        wrote = scenes.write_dataset(folder, split=split, **args)
    else:
        wrote = moving_shapes.write_dataset(folder, combinations=COMBINATIONS[split], **args)
    print(f"{folder}: {'written' if wrote else 'done already'}")


if __name__ == "__main__":
    cli.run(main)
