"""The captions file: what is read, and that every mistake in it is named."""

import json

import pytest

from opensora_jax.data.captions import CaptionsError, expect_a_video, read_captions
from opensora_jax.files import write_json

ENTRIES = [
    {"file": "a.mp4", "captions": ["a cat", "Ein Kätzchen"]},
    {"file": "sub/b.mp4", "captions": ["a dog"], "color": "red"},
]


def write(tmp_path, text, name="captions.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_list_and_lines_read_the_same(tmp_path):
    as_list = write(tmp_path, json.dumps(ENTRIES, indent=2))
    lines = "\n\n".join(json.dumps(entry) for entry in ENTRIES) + "\n"
    as_lines = write(tmp_path, lines, "captions.jsonl")
    assert list(read_captions(as_list)) == list(read_captions(as_lines)) == ENTRIES


def test_a_caption_may_hold_any_line_separator_and_the_file_a_byte_order_mark(tmp_path):
    entry = {"file": "a.mp4", "captions": ["one\u2028two"]}
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(entry, ensure_ascii=False).encode())
    assert list(read_captions(path)) == [entry]


def test_paths_are_normalised(tmp_path):
    path = write(tmp_path, '[{"file": "./sub//a.mp4", "captions": ["a"]}]')
    assert read_captions(path)[0]["file"] == "sub/a.mp4"


def test_written_json_reads_back_and_leaves_nothing_else(tmp_path):
    write_json(tmp_path / "captions.json", ENTRIES)
    assert list(read_captions(tmp_path / "captions.json")) == ENTRIES
    assert [path.name for path in tmp_path.iterdir()] == ["captions.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no entries"),
        ("[]", "no entries"),
        ("[{]", r"captions.json: not JSON .* at line 1 column 3\)"),
        ('[\n{"file": "a.mp4",\n', r"captions.json: not JSON .* at line 3 column 1\)"),
        ('{"file": "a.mp4", "captions": ["a"]}\n{oops}', r"line 2: not JSON .* at column 2\)"),
        ('{"file": "a.mp4", "captions": ["a"]}\n\n{"file": "b', r"line 3: not JSON .*column 10\)"),
        ('[{"file": "a.mp4"}]'.encode("utf-16"), "UTF-16 or UTF-32 text: expected UTF-8"),
        ('{"file": "a.mp4"}'.encode("utf-16-be"), "UTF-16 or UTF-32 text: expected UTF-8"),
        (b'[{"file": "\xff"}]', "not UTF-8 text .* at byte 11"),
        ('["a.mp4"]', "entry 0: 'a.mp4': expected"),
        ('{"file": "a.mp4", "captions": ["a"]}\n7', "line 2: 7: expected"),
        ('[{"captions": ["a"]}]', "entry 0: no 'file', only"),
        ('[{"file": "a.mp4", "caption": "a"}]', "entry 0: no 'captions', only"),
        ('[{"file": 3, "captions": ["a"]}]', "entry 0: file=3: expected the name"),
        ('[{"file": " ", "captions": ["a"]}]', "entry 0: file=' ': expected the name"),
        ('[{"file": "../a.mp4", "captions": ["a"]}]', r"file='\.\./a\.mp4': .* inside the video"),
        ('[{"file": "/etc/a.mp4", "captions": ["a"]}]', "file='/etc/a.mp4': .* inside the video"),
        ('[{"file": ".", "captions": ["a"]}]', "inside the video folder"),
        ('[{"file": "a.mp4", "captions": []}]', r"captions=\[\]: expected a list"),
        ('[{"file": "a.mp4", "captions": "a"}]', "captions='a': expected a list"),
        ('[{"file": "a.mp4", "captions": ["a", null]}]', r"captions\[1\]=None: expected a string"),
        ('[{"file": "a.mp4", "captions": [" "]}]', r"captions\[0\]=' ': expected a string, not"),
        ("[" * 100_000, "nested too deeply"),
        ('{"file": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('[{"file": ' + "9" * 10_000 + "}]", "not JSON"),
        (
            '[{"file": "a.mp4", "captions": ["a"]}, {"file": "./a.mp4", "captions": ["b"]}]',
            "entry 1: file='a.mp4' is already at entry 0",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(CaptionsError, match=message) as caught:
        read_captions(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CaptionsError, match=r"nowhere\.json: no such file"):
        read_captions(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "entry",
    [
        "x" * 10**6,
        {"x" * 10**6: 0},
        {"file": ["x"] * 10**6, "captions": ["a"]},
        {"file": "../" + "x" * 10**6, "captions": ["a"]},
        {"file": "a.mp4", "captions": {"x" * 10**6: 1}},
        {"file": "a.mp4", "captions": [["x" * 10**6]]},
    ],
)
def test_long_values_are_cut(tmp_path, entry):
    path = write(tmp_path, json.dumps([entry]))
    with pytest.raises(CaptionsError) as caught:
        read_captions(path)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(CaptionsError, match=rf"{tmp_path}: no entries: expected"):
        read_captions(tmp_path)


def test_half_an_emoji_becomes_a_question_mark_and_a_whole_one_stays(tmp_path):
    path = write(tmp_path, r'[{"file": "a.mp4", "captions": ["cut \ud83d", "whole \ud83d\ude00"]}]')
    assert read_captions(path)[0]["captions"] == ["cut ?", "whole \U0001f600"]


def test_a_folder_without_any_of_the_videos_is_named(tmp_path):
    entries = [{"file": name, "captions": ["a"]} for name in ("x" * 300, "\ud83d.mp4", "b.mp4")]
    with pytest.raises(CaptionsError, match="none of the captions' videos is there, not 'xxx"):
        expect_a_video(entries, tmp_path)
    (tmp_path / "b.mp4").write_text("")
    expect_a_video(entries, tmp_path)


def test_a_key_of_an_entry_is_not_taken_for_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"file": "a.mp4", "captions": ["x"], "problem": None, "id": 3}]))
    assert list(read_captions(path)) == [{"file": "a.mp4", "captions": ["x"], "id": 3}]


def test_columns_that_nobody_asked_for_may_hold_anything(tmp_path):
    rows = [f"{i}.mp4,a cat,{i}" for i in range(60_000)] + ["z.mp4,a dog,N/A"]
    (tmp_path / "a.csv").write_text("\n".join(["file,captions,duration", *rows]))
    assert len(read_captions(tmp_path / "a.csv")) == 60_001
