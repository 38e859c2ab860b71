"""MSR-VTT as it is published -> one video folder and one captions file per split.

    python data_prep/collate_msrvtt.py -d data/MSRVTT -o data/msrvtt

Reads (the layout of the archive that download_msrvtt.sh fetches)
    DIR/annotation/MSR_VTT.json      {"annotations": [{"image_id": "video0", "caption": "..."}]}
    DIR/structured-symlinks/{train,val,test}_list_full.txt      one video per line
    DIR/videos/all/*.mp4
and writes
    OUT/{train,val,test}/annotations.json      a captions file: all captions of a video together
    OUT/{train,val,test}/videos/               hard links, or copies across file systems
    OUT/collate_report.json                    counts, and what could not be used
Running it again changes nothing.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from opensora_jax import cli
from opensora_jax.files import read_json, short, write_json

SPLITS = ("train", "val", "test")
_MOST_NAMES = 10  # on the screen; the report names all
_LONGEST_NAME = 60  # in characters of up to four bytes: file systems take 255 bytes


def collate(source: Path, output: Path) -> dict:
    """Writes the splits; returns what collate_report.json holds.

    Raises:
      FileNotFoundError: a file of the archive is missing.
      ValueError: one is not as expected.
    """
    annotations = source / "annotation" / "MSR_VTT.json"
    captions, blank = read_annotations(annotations)
    splits = {}
    for split in SPLITS:
        splits[split] = read_list(source / "structured-symlinks" / f"{split}_list_full.txt")
    videos = source / "videos" / "all"
    if not videos.is_dir():
        raise FileNotFoundError(f"{videos}: no such folder: expected the videos")

    report = {"splits": {}, "blank_captions_of": blank}
    for split, names in splits.items():
        usable = [name for name in names if name in captions and _video(videos, name).is_file()]
        if not usable:
            raise ValueError(f"{videos}: not one of the {len(names)} videos of {split} is usable")
        folder = output / split
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        for name in tqdm(usable, desc=split, unit="video"):
            link_or_copy(_video(videos, name), folder / "videos" / f"{name}.mp4")
        entries = [{"file": f"{name}.mp4", "captions": captions[name]} for name in usable]
        write_json(folder / "annotations.json", entries)
        report["splits"][split] = {
            "videos": len(usable),
            "captions": sum(len(entry["captions"]) for entry in entries),
            "missing_videos": [name for name in names if not _video(videos, name).is_file()],
            "videos_without_captions": [name for name in names if name not in captions],
        }
    listed = [name for names in splits.values() for name in names]
    report["captioned_but_in_no_split"] = sorted(captions.keys() - set(listed))
    report["captions_in_no_split"] = sum(
        len(captions[name]) for name in report["captioned_but_in_no_split"]
    )
    times_listed = Counter(listed)
    report["in_several_splits"] = sorted(name for name in times_listed if times_listed[name] > 1)
    write_json(output / "collate_report.json", report)
    return report


def read_annotations(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """All captions of each video, in the file's order; and the videos of the blank ones."""
    _expect(path)
    annotations = read_json(path).get("annotations")
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: annotations={short(annotations)}: expected a list")
    captions, blank = {}, []
    for i, annotation in enumerate(annotations):
        where = f"{path}: annotations[{i}]"
        if not isinstance(annotation, dict):
            raise ValueError(f"{where}={short(annotation)}: expected an object")
        for key in ("image_id", "caption"):
            if not isinstance(annotation.get(key), str):
                found = short(annotation.get(key))
                raise ValueError(f"{where}: {key}={found}: expected a string")
        name = _name(annotation["image_id"], where)
        if annotation["caption"].strip():
            captions.setdefault(name, []).append(annotation["caption"].strip())
        else:
            blank.append(name)
    return captions, blank


def read_list(path: Path) -> list[str]:
    """The names of the videos of a split, without .mp4, each once."""
    _expect(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason}") from None
    numbered = enumerate(lines, start=1)
    names = [_name(line.strip(), f"{path}: line {i}") for i, line in numbered if line.strip()]
    if not names:
        raise ValueError(f"{path}: empty: expected one video per line")
    return list(dict.fromkeys(names))


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy; it appears whole or not at all."""
    source = source.resolve()
    if target.exists() and (
        target.samefile(source) or target.stat().st_size == source.stat().st_size
    ):
        return
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _expect(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file: expected the layout of the archive of download_msrvtt.sh"
        )


def _name(name, where):
    name = name.removesuffix(".mp4")
    is_file_name = Path(name).name == name and name.isprintable() and len(name) <= _LONGEST_NAME
    if not name or not is_file_name:
        raise ValueError(f"{where}: {short(name)}: expected the name of a video, such as video0")
    return name


def _video(folder, name):
    return folder / f"{name}.mp4"


def _print_names(what, names):
    if names:
        shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
        print(f"  {len(names)} {what}: {shown}")


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("-d", "--directory", required=True, type=Path, help="the unpacked archive")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to write")
    arguments = parser.parse_args()
    report = collate(arguments.directory, arguments.output)
    for split, found in report["splits"].items():
        print(f"{split}: {found['videos']} videos, {found['captions']} captions")
        _print_names("videos missing", found["missing_videos"])
        _print_names("videos without captions", found["videos_without_captions"])
    in_no_split = report["captioned_but_in_no_split"]
    print(f"{report['captions_in_no_split']} captions of videos in no split")
    _print_names("captioned videos in no split", in_no_split)
    _print_names("blank captions left out", report["blank_captions_of"])
    _print_names("videos in several splits", report["in_several_splits"])
    print(f"all names: {arguments.output / 'collate_report.json'}")


if __name__ == "__main__":
    cli.run(main)
