"""What is too much for memory, in temporary databases: entries of captions, numbers of texts.

As Python objects ten million entries take gigabytes. SQLite keeps a few megabytes of them in memory
and the rest in a file without a name in TMPDIR, which is gone with the process, however it ends.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_CACHE_KIB = 65_536


def _database(table: str) -> sqlite3.Connection:
    # An engine's thread takes over what another has filled.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}"):
        database.execute(f"PRAGMA {pragma}")
    database.execute(f"CREATE TABLE {table}")
    database.execute("BEGIN")
    return database


class Entries(Sequence):
    """Entries of captions, in the order in which they were added: dicts, as JSON can have them."""

    def __init__(self):
        self._database = _database(
            "entries (number INTEGER PRIMARY KEY, file BLOB UNIQUE, place TEXT, entry TEXT)"
        )
        self._n = 0

    def add(self, place: str, entry: dict[str, Any], *, is_usable: bool = True) -> str | None:
        """Adds an entry, unless there is a usable one of the same file.

        Args:
          place: where it stands, as an error names it.

        Returns:
          The place of that other one; None: it was added.
        """
        file = entry["file"].encode(errors="surrogatepass") if is_usable else None
        row = (file, place.encode(errors="backslashreplace").decode(), json.dumps(entry))
        insert = "INSERT INTO entries (file, place, entry) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        if self._database.execute(insert, row).rowcount:
            self._n += 1
            return None
        query = "SELECT place FROM entries WHERE file = ?"
        return self._database.execute(query, (file,)).fetchone()[0]

    def add_captions(self, file: str, captions: list[str]) -> None:
        """Adds captions to those of an entry that is there."""
        key = file.encode(errors="surrogatepass")
        query = "SELECT number, entry FROM entries WHERE file = ?"
        number, text = self._database.execute(query, (key,)).fetchone()
        entry = json.loads(text)
        entry["captions"] += captions
        update = "UPDATE entries SET entry = ? WHERE number = ?"
        self._database.execute(update, (json.dumps(entry), number))

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.between(0, self._n)

    def between(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The entries of these numbers, from 0 on, one by one."""
        query = "SELECT entry FROM entries WHERE number > ? AND number <= ? ORDER BY number"
        for (text,) in self._database.execute(query, (start, stop)):
            yield json.loads(text)

    def some(self, numbers: Iterable[int]) -> "Entries":
        """The entries of these numbers, in this order."""
        found = Entries()
        for number in numbers:
            found.add("", self[number], is_usable=False)  # nor looked up by their files
        return found

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._n)
            return list(self.between(start, stop))
        if not -self._n <= index < self._n:
            raise IndexError(index)
        return next(self.between(index % self._n, index % self._n + 1))


class Numbers:
    """Texts -> numbers; a text is known by its hash (BLAKE2b, 128 bits)."""

    def __init__(self):
        table = "numbers (text BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID"
        self._database = _database(table)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def __contains__(self, text: str) -> bool:
        return self._find(text) is not None

    def __getitem__(self, text: str) -> int:
        found = self._find(text)
        if found is None:
            raise KeyError(text)
        return found

    def __setitem__(self, text: str, number: int) -> None:
        """Gives a number to a text that has none yet."""
        self._database.execute("INSERT INTO numbers VALUES (?, ?)", (_hash(text), number))
        self._n += 1

    def _find(self, text: str) -> int | None:
        query = "SELECT number FROM numbers WHERE text = ?"
        found = self._database.execute(query, (_hash(text),)).fetchone()
        return found and found[0]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
