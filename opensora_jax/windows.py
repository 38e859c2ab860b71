"""Frames and latents: how many of the one stand for how many of the other, window by window."""

import dataclasses


class WindowError(ValueError):
    """A window that no whole number of latents stands for; `expected` says what it has to be."""

    def __init__(self, frames: int, expected: str):
        super().__init__(f"window={frames}: expected {expected}")
        self.expected = expected


@dataclasses.dataclass(frozen=True)
class Windows:
    """How videos are cut in time to be encoded: into windows, each by itself, and a shorter rest.

    Attributes:
      stride: frames a latent.
      causal: whether the first frame of each window has a latent of its own.
      frames: of a window.

    Raises:
      WindowError: a window that no whole number of latents stands for.
    """

    stride: int
    causal: bool
    frames: int

    def __post_init__(self):
        rest = (self.frames - self.causal) % self.stride
        if self.frames < self.least or rest:
            raise WindowError(self.frames, self.expected)

    @property
    def expected(self) -> str:
        """What a window's frames have to be, in words."""
        return (
            f"1 and a multiple of {self.stride}" if self.causal else f"a multiple of {self.stride}"
        )

    @property
    def least(self) -> int:
        """Frames of the shortest video."""
        return 1 if self.causal else self.stride

    def latents(self, n_frames: int) -> int:
        """The most latents that a video of so many frames gives."""
        whole, rest = divmod(n_frames, self.frames)
        return whole * self._latents(self.frames) + self._latents(rest)

    def n_frames(self, n_latents: int) -> int:
        """Frames of so many latents."""
        whole, rest = divmod(n_latents, self._latents(self.frames))
        return whole * self.frames + max(rest * self.stride - (self.stride - 1) * self.causal, 0)

    def fit(self, n_frames: int) -> int:
        """The most frames, of so many, that a whole number of latents stands for."""
        return self.n_frames(self.latents(n_frames))

    def near(self, n_frames: int) -> str:
        """What `n_frames`, which do not fit, would have to be, in words."""
        if not self.causal:
            return self.expected
        below, above = self.fit(n_frames), self.n_frames(self.latents(n_frames) + 1)
        return f"{self.expected} in windows of {self.frames}, such as {max(below, 1)} or {above}"

    def _latents(self, n_frames):
        """Of at most one window."""
        return (n_frames + (self.stride - 1) * self.causal) // self.stride
