"""Writes a folder of captioned moving shapes: real video files to train on and to try things with.

python data_prep/moving_shapes.py -o shapes --n_videos 1000
"""

import argparse

from opensora_jax.data import moving_shapes

COMBINATIONS = {
    "all": moving_shapes.ALL,
    "seen": moving_shapes.SEEN,
    "held_out": moving_shapes.HELD_OUT,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-o", "--output_dir", required=True, help="gets videos/ and captions.json")
    parser.add_argument("--n_videos", type=int, default=1000, help="number of videos")
    parser.add_argument(
        "--combinations",
        choices=COMBINATIONS,
        default="all",
        help="which (color, shape, direction) to show",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides everything that is drawn")
    parser.add_argument("--n_frames", type=int, default=8, help="frames a video")
    parser.add_argument("--resolution", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--fps", type=float, default=8, help="frames a second")
    parser.add_argument("--n_captions", type=int, default=3, help="phrasings a video")
    args = vars(parser.parse_args())

    folder = args.pop("output_dir")
    args["combinations"] = COMBINATIONS[args["combinations"]]
    try:
        wrote = moving_shapes.write_dataset(folder, **args)
    except ValueError as error:
        parser.error(str(error))
    print(f"{folder}: {'written' if wrote else 'done already'}")


if __name__ == "__main__":
    main()
