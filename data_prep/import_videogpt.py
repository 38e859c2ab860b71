"""A VQ-VAE of VideoGPT -> a folder that serves wherever a tokenizer is named.

    python data_prep/import_videogpt.py -i vqvae.ckpt -o vqvae

Reads the checkpoints of https://github.com/wilson1yan/VideoGPT (PyTorch's file format, without
PyTorch; no code in them is run). Running it again changes nothing.
"""

from etils import epath

from opensora_jax import cli
from opensora_jax.convert import videogpt
from opensora_jax.inference.tokenizer import import_tokenizer, summary
from opensora_jax.models.vqvae import VQVAE


def import_videogpt(
    checkpoint: epath.PathLike,
    output: epath.PathLike,
    downsample: tuple[int, int, int] | None = None,
    n_frames: int | None = None,
) -> tuple[VQVAE, bool]:
    """Returns (the model, whether it was written rather than there already).

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: not a checkpoint of VideoGPT's VQ-VAE, or another model in `output`.
    """
    model = videogpt.load_videogpt(checkpoint, downsample=downsample, n_frames=n_frames)
    return model, import_tokenizer(checkpoint, model, output)


def main() -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("-i", "--checkpoint", required=True, help="VideoGPT's .ckpt, or a bare state_dict")
    add("-o", "--output", required=True, help="folder for the imported model")
    add(
        "--downsample",
        type=int,
        nargs=3,
        metavar=("T", "H", "W"),
        help="factors in time, height and width (default: as the checkpoint says)",
    )
    add(
        "--n_frames",
        type=int,
        help="frames of the clips it was trained on (default: as the checkpoint says, or 16)",
    )
    args = parser.parse_args()
    model, is_new = import_videogpt(args.checkpoint, args.output, args.downsample, args.n_frames)
    print(summary(model))
    print(f"{args.output}: {'written' if is_new else 'done already'}")


if __name__ == "__main__":
    cli.run(main)
