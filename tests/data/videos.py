"""Videos to try things with, as arrays and as files."""

from fractions import Fraction

import av
import numpy as np

from opensora_jax.data import clips


def gradient_video(n_frames=8, height=48, width=64):
    """Smooth frames that codecs keep well; frame t is brighter by 10 t in blue."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([4 * y % 256, 3 * x % 256, 0 * x], -1).clip(0, 255)
    return np.stack([frame + [0, 0, 10 * t] for t in range(n_frames)]).astype(np.uint8)


def mean_error(a, b):
    return np.abs(a.astype(float) - b).mean()


def write_lossless(path, frames, pts=None, pixel_format="rgb24", rate=10):
    """An FFV1 file in Matroska: any size, any timestamps (milliseconds), exact pixels."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"rgb24": "bgr0", "rgba": "bgra", "gray": "gray"}[pixel_format]
        stream.codec_context.time_base = Fraction(1, 1000)
        for t, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format=pixel_format)
            frame.pts = pts[t] if pts else round(1000 * t / rate)
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_encoded(
    path,
    frames,
    codec="libx264",
    *,
    rate=8,
    prepare=None,
    seconds_of_sound=0,
    aspect=1,
    pixel_format=None,
    **options,
):
    """A file of any format, by suffix.

    Args:
      prepare: makes the frame to encode of an RGB frame; None leaves the conversion to libav.
      aspect: width over height of a pixel.
      pixel_format: of the file; None: the encoder's first.
      options: the format's, such as movflags.
    """
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if pixel_format:
            stream.pix_fmt = pixel_format
        sound = container.add_stream("pcm_s16le", rate=8000) if seconds_of_sound else None
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(prepare(frame, stream) if prepare else frame))
        container.mux(stream.encode())
        if sound:
            samples = av.AudioFrame.from_ndarray(
                np.zeros((1, 8000 * seconds_of_sound), np.int16), format="s16", layout="mono"
            )
            samples.sample_rate = 8000
            container.mux(sound.encode(samples))
            container.mux(sound.encode())


def decoded(decoding, folder, entries):
    """Of each entry, in order, what became of each of its clips, and the frames of those kept."""
    windows, outcomes = {}, {}
    for i, piece in clips.decode_clips(decoding, folder, entries):
        assert i not in outcomes  # the last
        if isinstance(piece, clips.Window):
            windows.setdefault((i, piece.clip), []).append(piece.frames_THWC)
        else:
            outcomes[i] = piece
    found = []
    for i in range(len(outcomes)):
        found.append([])
        for k, clip in enumerate(outcomes[i]):
            frames = None
            if isinstance(clip, clips.Clip):
                assert len(windows[i, k]) == clip.n_windows
                frames = np.concatenate(windows[i, k])
                assert len(frames) == clip.n_frames
            found[i].append((clip, frames))
    return found


def decoded_whole(decoding, folder, entries):
    """As `decoded`, of videos of one clip each."""
    return [one for (one,) in decoded(decoding, folder, entries)]
