"""The page of a dataset, of real videos encoded by a real tokenizer."""

import json
import shutil
from html.parser import HTMLParser

import pytest
from made_world import make_world, run_on, write_captions, write_video

from opensora_jax import inspect_data
from opensora_jax.data.dataset import DatasetError
from opensora_jax.data.dataset_writer import write_metadata

HOSTILE = (
    """--></p></pre></title></style></svg>"'><script>alert(1)</script> {{ 7 * 7 }} {% raw %}"""
)


class Tags(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.page = path.read_text()
        self.feed(self.page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs if name != "d")))

    def handle_data(self, data):
        self.text += f" {data}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    run_on(world := folder, folder / "dataset", window=16, resolution=(16, 16))
    return world


def test_the_page_shows_what_is_in_the_dataset(world, tmp_path, capsys):
    inspect_data.main([str(world / "dataset"), "--output", str(tmp_path / "page.html")])
    assert f"inspect_data: {tmp_path}/page.html" in capsys.readouterr().out
    page = Tags(tmp_path / "page.html")
    words = " ".join(page.text.split())
    for text in (
        "3 videos",
        "5 distinct captions",
        "1 filtered: more than N frames",
        "1 filtered: N frames expected at least N",
        "1 failed: no such file",
        "16 x 16 pixels",
        "whole.mp4",
        "a blue square moves left",
        "red 1",
    ):
        assert text in words.replace(",", ""), (text, words)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("video") >= 3
    assert tags.count("svg") == 5
    assert "script" not in tags
    assert "Content-Security-Policy" in page.page
    assert "http://" not in page.page.replace("http://www.w3.org", "")


def test_captions_and_names_stay_text(world, tmp_path):
    pages = []
    for text in ("plain", HOSTILE):
        folder = tmp_path / text[:5].strip("-")
        (folder / "videos").mkdir(parents=True)
        name = f"{text.replace('/', '|')}.mp4"
        write_video(folder / "videos" / name, 16)
        captions = {name: [text], f"{name}.txt": ["x"]}
        path = write_captions(folder / "captions.json", captions)
        options = {"captions": path, "videos": folder / "videos", "window": 16}
        run_on(world, folder / "dataset", **options)
        metadata = json.loads((folder / "dataset" / "metadata.json").read_text())
        metadata |= {"command": text, "text_model": text}
        del metadata["checksum"]
        write_metadata(folder / "dataset", metadata)
        output = folder / "page.html"
        inspect_data.inspect(folder / "dataset", output, vqvae=world / "vqvae")
        pages.append(Tags(output))
    # There are more words, but no element and no attribute of another kind.
    assert set(pages[0].tags) == set(pages[1].tags)
    assert pages[1].text.count("alert(1)") >= 4
    assert "49" not in pages[1].text.split("How it was made")[1]


def test_another_tokenizer_and_no_dataset_are_told(world, tmp_path):
    with pytest.raises(DatasetError, match="no such file: expected a dataset"):
        inspect_data.main([str(tmp_path), "--output", str(tmp_path / "page.html")])
    shutil.copytree(world / "dataset", tmp_path / "other")
    metadata = json.loads((tmp_path / "other" / "metadata.json").read_text())
    del metadata["checksum"]
    write_metadata(tmp_path / "other", metadata | {"vqvae_fingerprint": "0123"})
    with pytest.raises(ValueError, match=r"expected '0123', the tokenizer that .*other was"):
        inspect_data.main([str(tmp_path / "other")])
    assert not (tmp_path / "other.html").exists()
