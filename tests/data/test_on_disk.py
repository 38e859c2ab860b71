"""Entries and numbers in temporary databases; JSON that is read bit by bit."""

import json

import numpy as np
import pytest

from opensora_jax.data import caption_files
from opensora_jax.data.captions import CaptionsError, read_captions
from opensora_jax.data.on_disk import Entries, Numbers

NAMES = ["a.mp4", "ünï 影片.mp4", "half \ud83d.mp4", "zero\0.mp4", "'; DROP TABLE entries; --.mp4"]


def test_entries_are_a_sequence():
    expected = [{"file": name, "captions": ["one", "\0 😀"], "more": [1]} for name in NAMES]
    entries = Entries()
    assert not entries
    assert [entries.add(f"line {i}", entry) for i, entry in enumerate(expected)] == [None] * 5
    assert len(entries) == 5
    assert list(entries) == list(entries) == expected
    assert [entries[i] for i in range(-5, 5)] == expected * 2
    for part in (slice(1, 3), slice(3, None), slice(-2, -1), slice(9, 9)):
        assert entries[part] == expected[part]
    assert list(entries.between(2, 4)) == expected[2:4]
    with pytest.raises(IndexError):
        entries[5]


def test_an_entry_of_the_same_file_is_told_and_not_added():
    entries = Entries()
    entries.add("line 1", {"file": "a.mp4", "captions": ["one"]})
    assert entries.add("line 2", {"file": "a.mp4", "captions": ["two"]}) == "line 1"
    bad = {"file": "a.mp4", "captions": [], "problem": "is there"}
    assert entries.add("line 2", bad, is_usable=False) is None
    entries.add_captions("a.mp4", ["two", "three"])
    assert list(entries) == [{"file": "a.mp4", "captions": ["one", "two", "three"]}, bad]


def test_numbers_are_kept_by_text():
    numbers = Numbers()
    for name in NAMES:
        assert name not in numbers
        numbers[name] = len(numbers)
    assert [numbers[name] for name in NAMES] == list(range(5))
    assert len(numbers) == 5
    with pytest.raises(KeyError, match="another"):
        numbers["another"]


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_bit_by_bit(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr(caption_files, "_PIECE", piece)
    captions = ["two\nlines", 'a "quote" \\ ]}', "Kätzchen 😀"]
    entries = [
        {"file": f"{i}.mp4", "captions": captions, "number": 10.0**i, "more": [[], {}]}
        for i in range(20)
    ]
    path = tmp_path / "captions.json"
    path.write_text("\ufeff \n" + json.dumps(entries, ensure_ascii=False, indent=indent) + " \n")
    assert list(read_captions(path)) == entries
    path = tmp_path / "captions.jsonl"
    path.write_text("\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))
    assert list(read_captions(path)) == entries


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_errors_are_where_they_are_however_much_is_read_at_a_time(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(caption_files, "_PIECE", piece)
    rng = np.random.default_rng(0)
    entry = {"file": "a.mp4", "captions": ["one", "two"]}
    whole = json.dumps([entry | {"file": f"{i}.mp4"} for i in range(3)], indent=1)
    path = tmp_path / "captions.json"
    for at in rng.choice(np.arange(1, len(whole)), 30):
        text = whole[:at] + "?" + whole[at + 1 :]
        path.write_text(text)
        problem = None
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            problem = rf"not JSON \(.* at line {error.lineno} column {error.colno}\)"
        if problem is None:  # in a string
            assert len(read_captions(path, strict=False)) == 3
        else:
            with pytest.raises(CaptionsError, match=problem):
                read_captions(path)
    path.write_bytes(whole.encode()[:90] + b"\xff" + whole.encode()[90:])
    with pytest.raises(CaptionsError, match=r"not UTF-8 text .* at byte 90\)"):
        read_captions(path)


def test_an_entry_without_end_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_files, "_PIECE", 100)
    monkeypatch.setattr(caption_files, "_LONGEST_VALUE", 1000)
    path = tmp_path / "captions.json"
    path.write_text('[{"file": "' + "x" * 10_000 + '"}]')
    with pytest.raises(CaptionsError, match=r"Unterminated string .* at line 1 column 11"):
        read_captions(path)
