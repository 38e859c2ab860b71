"""Clips that look like one before them."""

from typing import Any

import numpy as np

from opensora_jax.data.clips import Clip, Filtered, Outcome
from opensora_jax.data.looks import HASH_BITS

_BLOCK = 2**16  # hashes that are compared at a time


class Duplicates:
    """Leaves out each clip whose hash is near that of a clip of another video that was kept.

    Clips are looked at in the order of the dataset, so that the first of those alike stays,
    whoever decodes them and when.

    Args:
      most_bits: by which near ones differ; 0: nothing is left out.
    """

    def __init__(self, most_bits: int):
        self._most_bits = most_bits
        self._hashes = np.zeros((HASH_BITS // 64, _BLOCK), np.uint64)  # and more, if need be
        self._files: list[str] = []

    def recall(self, record: dict[str, Any]) -> None:
        """Takes the clips that a part, of which this is noted, holds."""
        for file, digits in record.get("hashes", ()):
            self._add(file, _bits(digits))

    def without(self, file: str, outcome: Outcome) -> Outcome:
        """What becomes of the clips of the next video."""
        if not self._most_bits:
            return outcome
        decided = [self._decide(file, x) if isinstance(x, Clip) else x for x in outcome]
        for clip in decided:
            if isinstance(clip, Clip):
                self._add(file, _bits(clip.hash))
        return decided

    def _decide(self, file: str, clip: Clip) -> Clip | Filtered:
        bits, n = _bits(clip.hash), len(self._files)
        for start in range(0, n, _BLOCK):
            known = self._hashes[:, start : min(start + _BLOCK, n)]
            # Few have a first word so near.
            near = np.flatnonzero(np.bitwise_count(known[0] ^ bits[0]) <= self._most_bits)
            distances = np.bitwise_count(known[:, near] ^ bits[:, None]).sum(axis=0)
            for i in np.flatnonzero(distances <= self._most_bits)[:1]:
                reason = f"near-duplicate: {distances[i]} of {HASH_BITS} bits differ"
                like = self._files[start + near[i]]
                return Filtered(file, reason, clip.start, clip.figures, like)
        return clip

    def _add(self, file: str, bits: np.ndarray) -> None:
        n = len(self._files)
        if n == self._hashes.shape[1]:
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)], axis=1)
        self._hashes[:, n] = bits
        self._files.append(file)


def _bits(digits: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digits), np.uint64)
