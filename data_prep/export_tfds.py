"""A finished dataset -> the same rows as a dataset of TensorFlow Datasets, in ArrayRecord files.

    python data_prep/export_tfds.py -i data/mine/dataset -o data/tfds --name mine

writes data/tfds/mine/1.0.0, which `tfds.builder_from_directory(...).as_data_source()` reads, and
which a training takes as its data.dataset: its batches are the same. No TensorFlow is needed. A row
is a record with all its features, so codes are stored as often as there are captions. Running it
again changes nothing.
"""

from pathlib import Path

from opensora_jax import cli
from opensora_jax.data.tfds_export import export


def main() -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("-i", "--dataset", required=True, help="folder of the dataset")
    add("-o", "--output", type=Path, required=True, help="folder of TFDS datasets")
    add("--name", required=True, help="of the new one: small letters, digits and _")
    args = parser.parse_args()
    print(export(args.dataset, args.output, args.name))


if __name__ == "__main__":
    cli.run(main)
