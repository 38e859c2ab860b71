"""Videos and captions -> the Arrow dataset that a DiT is trained on.

    python data_prep/preprocess_data.py -c captions.json -v videos -o dataset --vqvae runs/vqvae

The captions file is a JSON list (or one object per line) of
    {"file": "video0.mp4", "captions": ["a cat sleeps", "a sleeping cat"]}
or one of the other kinds below; or both come from a dataset of TensorFlow Datasets, --tfds. Each
caption becomes a row. Run the same command again to go on after an interruption.
"""

from opensora_jax import process

if __name__ == "__main__":
    process.listen()  # before the imports, which take seconds

import argparse
from pathlib import Path
from typing import Any

from opensora_jax import cli, files, runtime
from opensora_jax.preprocessing.options import VIDEO_TIMEOUT, Options
from opensora_jax.stages.preprocess import preprocess
from opensora_jax.stages.preprocess_buckets import preprocess_buckets


def main() -> None:
    parser = _parser()
    arguments = vars(parser.parse_args())
    resolution, buckets = arguments.pop("resolution"), arguments.pop("buckets")
    if resolution and len(resolution) > 2:
        parser.error(f"--resolution {resolution}: expected one or two numbers")
    if resolution and buckets:
        parser.error(f"--resolution {resolution}: expected none, since --buckets says it")
    of_paths = ("output", "captions", "videos", "tfds")
    given = {name: arguments.pop(name) for name in of_paths}
    of_tfds = {name: arguments.pop(f"tfds_{name}") for name in ("split", "video", "text", "fps")}
    of_buckets = {name: arguments.pop(name) for name in ("bucket_tokens", "patch")}
    columns = (arguments.pop("file_column"), arguments.pop("caption_column"))
    for name in ("fps", "max_frames", "n_frames", "window", "tile", "video_timeout"):
        arguments[name] = arguments[name] or None
    height, width = ((resolution or [128]) * 2)[:2]  # one number stands for both
    options = Options(resolution=(height, width), columns=columns, **arguments)
    options.check_engine()
    options.check()
    paths = _paths(parser, **given, of_tfds=of_tfds)
    runtime.keep_compiled_programs()
    if buckets:
        preprocess_buckets(*paths, options, asked=buckets, **of_buckets)
    else:
        preprocess(*paths, options)


def _paths(
    parser: argparse.ArgumentParser,
    output: str,
    captions: str | None,
    videos: str | None,
    tfds: str | None,
    of_tfds: dict[str, Any],
) -> list[str | Path]:
    """Captions, videos and output; those of TFDS are written first."""
    if tfds is None:
        if captions is None or videos is None:
            parser.error("expected --captions and --videos, or --tfds")
        return [captions, videos, output]
    if captions is not None or videos is not None:
        parser.error("expected --captions and --videos, or --tfds")
    if files.is_remote(output):
        parser.error(f"--output {output}: expected a folder of this machine with --tfds")
    from opensora_jax.data.tfds_videos import write_videos

    return [*write_videos(tfds, Path(f"{output}.tfds"), **of_tfds), output]


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add(
        "-c",
        "--captions",
        help="captions: .json, .jsonl, .csv, .tsv, .parquet, a folder of videos with a .txt beside "
        "each, a WebDataset .tar or a folder of such",
    )
    add("-v", "--videos", help="folder that the file names are relative to")
    add("-o", "--output", required=True, help="folder for the dataset")
    add(
        "--tfds",
        metavar="NAME",
        help="in place of captions and videos a dataset of TensorFlow Datasets: its name, or the "
        "folder of a prepared one; its videos are written, losslessly, into OUTPUT.tfds first",
    )
    add("--tfds_split", default="train", help="of --tfds: the split")
    add("--tfds_video", default="video", help="of --tfds: the feature of videos")
    add(
        "--tfds_text",
        default="caption",
        help="of --tfds: the feature of texts, or of classes that have names; a/b is b in a",
    )
    add("--tfds_fps", type=float, default=8, help="of --tfds: frames a second of its videos")
    add(
        "--vqvae",
        required=True,
        help="tokenizer: the folder of the stage vqvae, an imported one, or a VideoGPT .ckpt",
    )
    add(
        "--text_model",
        default="openai/clip-vit-base-patch32",
        help="CLIP: a name on the Hugging Face hub or a folder",
    )
    add(
        "--resolution",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="height and width, or one number for both: videos are resized to cover this, then "
        "cropped to it (default: 128)",
    )
    add(
        "--buckets",
        metavar="TxHxW,...",
        help="instead of one resolution: frames x height x width of several, as "
        "16x96x160,1x128x128, each a dataset in OUTPUT/16x96x160, or auto, which chooses them by "
        "the videos; a video goes to the one that loses least of it, images to those of one frame; "
        "not with --split_scenes",
    )
    add(
        "--bucket_tokens",
        type=int,
        default=0,
        help="of --buckets auto: tokens of a clip at most, each a latent frame x patch x patch",
    )
    add("--patch", type=int, default=2, help="of --buckets auto: the DiT's patch, in latents")
    add("--fps", type=float, default=8, help="resample to this frame rate; 0: each video's own")
    add(
        "--max_frames",
        type=int,
        default=0,
        help="leave out videos with more frames than this, after resampling; 0: none",
    )
    add(
        "--n_frames",
        type=int,
        default=0,
        help="cut every video to this many frames and leave out shorter ones; 0: keep all; with "
        "--buckets auto: frames of a bucket at most",
    )
    add(
        "--clip_frames",
        type=int,
        default=0,
        help="cut videos into clips of this many frames, each with rows of its own, and leave out "
        "shorter ones; 0: a video is one clip",
    )
    add(
        "--clip_stride",
        type=int,
        default=0,
        help="frames from the begin of a clip to that of the next; 0: those of a clip",
    )
    add(
        "--window",
        type=int,
        default=0,
        help="frames that are encoded together; 0: the length the tokenizer was trained on",
    )
    add(
        "--tile",
        type=int,
        default=0,
        help="pixels of the overlapping tiles that frames too large for the device are encoded in; "
        "0: whole",
    )
    add("--batch_size", type=int, default=8, help="windows at a time")
    add(
        "--videos_per_part",
        type=int,
        default=64,
        help="videos between points to go on from after an interruption",
    )
    add(
        "--flat",
        action="store_true",
        help="each row with all its columns, as datasets.load_from_disk reads a part: codes and "
        "features are stored as often as there are captions",
    )
    add(
        "--split_scenes",
        action="store_true",
        help="cut videos where another shot begins, so that no clip spans two (needs the extra "
        "scenes)",
    )
    add(
        "--crop_bars",
        action="store_true",
        help="cut black bars off videos before they are resized",
    )
    add("--min_side", type=int, default=0, help="leave out videos with a shorter side, in pixels")
    add(
        "--min_motion",
        type=float,
        default=0,
        help="leave out videos whose pixels differ less from frame to frame, of 255; 0.5 leaves "
        "out what stands still",
    )
    add(
        "--min_brightness",
        type=float,
        default=0,
        help="leave out videos whose brightest frame is darker, of 255",
    )
    add(
        "--max_frozen",
        type=float,
        default=0,
        help="leave out videos of which a larger share is one run of equal frames; 0: none",
    )
    add(
        "--near_duplicates",
        type=int,
        default=0,
        metavar="BITS",
        help="leave out clips that differ in no more of 256 bits of what they look like from one "
        "of another video before them; 0: none, 10 finds the same in another size or encoding",
    )
    add(
        "--dry_run",
        action="store_true",
        help="only say what would become of the videos, in OUTPUT/dry_run.json",
    )
    add("--file_column", default="file", help="of a table: the column of file names")
    add("--caption_column", default="captions", help="of a table: the column of captions")
    add(
        "--strict",
        action="store_true",
        help="end at the first entry or video that cannot be used, instead of leaving it out",
    )
    add(
        "--video_timeout",
        type=float,
        default=VIDEO_TIMEOUT,
        help="seconds after which a video counts as failed, as one whose decoder hangs; 0: none "
        "(default: 21600, for whole films in 4K)",
    )
    add(
        "--engine",
        default="local",
        help="local: this machine; ray: all machines of a Ray cluster (docs/data.md)",
    )
    add(
        "--ray_address",
        help="of the cluster, auto for the one that this machine belongs to; without it Ray "
        "starts on this machine alone",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
