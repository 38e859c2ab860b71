"""A discrete video tokenizer of Cosmos-Tokenizer -> a folder that serves wherever one is named.

    python data_prep/import_cosmos.py -i Cosmos-Tokenizer-DV4x8x8 -o cosmos

Reads encoder.jit and decoder.jit, or autoencoder.jit, or a state_dict (.pt, .safetensors) of
https://github.com/NVIDIA/Cosmos-Tokenizer, without PyTorch; no code in them is run. Running it
again changes nothing.
"""

from opensora_jax import cli
from opensora_jax.convert import cosmos
from opensora_jax.inference.tokenizer import import_tokenizer, summary


def main() -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("-i", "--source", required=True, help="folder or file of the tokenizer")
    add("-o", "--output", required=True, help="folder for the imported model")
    add(
        "--downsample",
        type=int,
        nargs=3,
        metavar=("T", "H", "W"),
        help="factors in time, height and width (default: as the name says, as in DV4x8x8)",
    )
    add(
        "--n_frames",
        type=int,
        default=17,
        help="frames of the windows that longer videos are cut into (default: 17)",
    )
    args = parser.parse_args()
    model = cosmos.load_cosmos(args.source, args.downsample, n_frames=args.n_frames)
    is_new = import_tokenizer(args.source, model, args.output)
    print(summary(model))
    print(f"{args.output}: {'written' if is_new else 'done already'}")


if __name__ == "__main__":
    cli.run(main)
