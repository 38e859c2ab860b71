"""What the frames of a clip show, as figures: how it moves, and how bright it is."""

import numpy as np


class Look:
    """Takes the frames of a clip, some at a time, and keeps figures of them alone.

    Args:
      wanted: of FIGURES those that are asked for.
    """

    def __init__(self, wanted: frozenset[str]):
        self._wanted = wanted
        self._brightest = 0.0
        self._changes: list[float] = []  # from each frame to the next
        self._last_HWC: np.ndarray | None = None

    def add(self, frames_THWC: np.ndarray) -> None:
        """Takes the next frames, uint8 (T, H, W, 3)."""
        if "brightness" in self._wanted:
            self._brightest = max(self._brightest, *(frame.mean() for frame in frames_THWC))
        if "motion" in self._wanted:
            for frame_HWC in frames_THWC.astype(np.int16):
                if self._last_HWC is not None:
                    self._changes.append(float(abs(frame_HWC - self._last_HWC).mean()))
                self._last_HWC = frame_HWC

    def figures(self) -> dict[str, float]:
        """Those that were asked for, by name."""
        found = {
            "motion": float(np.mean(self._changes or [0.0])),
            "brightness": float(self._brightest),
        }
        return {name: found[name] for name in FIGURES if name in self._wanted}


# motion: by how much pixels differ on average from one frame to the next, of 255; 0 of one frame.
# brightness: of pixels on average in the brightest frame, of 255.
FIGURES = ("motion", "brightness")
