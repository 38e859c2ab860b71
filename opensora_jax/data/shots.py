"""Where a video cuts from one shot to the next: PySceneDetect's work (the extra `scenes`)."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np

from opensora_jax.data import video_io
from opensora_jax.data.video_window import Timeline

_SIDE = 256  # pixels of the longer side that is looked at


def expect_installed() -> None:
    """Raises ValueError where PySceneDetect is not."""
    if importlib.util.find_spec("scenedetect") is None:
        raise ValueError(
            "split_scenes=True: PySceneDetect is not installed: pip install 'opensora_jax[scenes]'"
        )


def cuts(path: Path, size: tuple[int, int], fps: float | None = None) -> list[int]:
    """The frames at which another shot begins, ascending, by PySceneDetect's ContentDetector.

    Args:
      size: (height, width) of the video.
      fps: frames per second that it is resampled to; None: each frame once.

    Raises:
      VideoError: it cannot be read.
    """
    import cv2
    from scenedetect import ContentDetector, FrameTimecode

    cv2.setNumThreads(1)  # callers look at many videos at once
    scale = min(1, _SIDE / max(size))
    small = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    detector = ContentDetector(min_scene_len=0)
    found = []
    for k, frame_HWC in enumerate(video_io.read_frames(path, resolution=small, fps=fps)):
        bgr_HWC = np.ascontiguousarray(frame_HWC[..., ::-1])
        # Any rate: it counts frames.
        found += detector.process_frame(FrameTimecode(k, fps=25.0), bgr_HWC)
    return [cut.frame_num for cut in found]


def of_timeline(timeline: Timeline, size: tuple[int, int]) -> list[range]:
    """The frames of each shot of a video of this (height, width), as `cuts` parts them."""
    if timeline.pts is None:  # so that its frames cannot be told but by reading them
        starts = cuts(timeline.path, size, timeline.fps)
    else:
        starts = np.searchsorted(timeline.frames, cuts(timeline.path, size)).tolist()
    edges = sorted({0, *starts, len(timeline)})
    return [range(a, b) for a, b in itertools.pairwise(edges)]
