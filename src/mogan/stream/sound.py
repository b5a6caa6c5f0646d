"""Sound to states: when somebody speaks, by loudness and voicing alone. No words are understood and no model is asked."""

from pathlib import Path

import av
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mogan.data.lists import unreadable
from mogan.data.stream import VIDEOS, open_file
from mogan.errors import UserError

SOUNDS = f"{VIDEOS},wav,w64,aiff,caf,au,flac,mp3,aac,ac3,eac3,amr,wv,tta,ape"  # FFmpeg's formats

RATE, WINDOW, HOP = 16000, 512, 160  # 32 ms, every 10 ms
PITCH = (60, 400)  # Hz, of voices
QUIET, ABOVE_FLOOR, VOICED = -50.0, 10.0, 0.5  # dB of full scale; dB above what is always there; of 1, how periodic
# of a chunk that is voiced; seconds after speech that count as listening where there is one voice
SHARE, PAUSE = (0.2, 2.0)
STATES = ("idle", "listening", "speaking")


def read_sound(path: Path) -> np.ndarray:
    """Samples at 16 kHz in [-1, 1], ``(1 or 2 channels, N)``, of whatever FFmpeg decodes.

    Raises:
        UserError: it cannot be read, or holds no sound.
    """
    if problem := unreadable(path):
        raise UserError(f"{path} {problem}: give a WAV file")
    try:
        with open_file(path, SOUNDS) as file:
            if not file.streams.audio or file.streams.audio[0].codec_context is None:
                raise UserError(f"{path} holds no sound: give a WAV file, or another with a sound track")
            layout = "mono" if file.streams.audio[0].channels == 1 else "stereo"
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=RATE)
            frames = [f for frame in file.decode(audio=0) for f in resampler.resample(frame)] + resampler.resample(None)
    except (av.FFmpegError, OSError, ValueError) as error:
        told = error.strerror if isinstance(error, av.FFmpegError) else error
        raise UserError(f"{path} cannot be read as sound ({told}): give a WAV file") from error
    if not frames:
        raise UserError(f"{path} holds no sound: give a WAV file, or another with a sound track")
    sound = np.concatenate([frame.to_ndarray() for frame in frames], 1)
    if not np.isfinite(sound).all():
        raise UserError(f"{path} holds samples that are infinite or none: it is damaged, give a WAV file")
    return sound


def voiced(samples: np.ndarray) -> np.ndarray:
    """Whether a voice is heard in ``(N,)`` samples at 16 kHz, bool every 10 ms: loud enough, and periodic at 60 to 400 Hz.

    Loud is above -50 dB of full scale and 10 dB above the quietest tenth; periodic is a peak of the normalised autocorrelation of
    at least 0.5.
    """
    if len(samples) < WINDOW:
        return np.zeros(0, bool)
    windows = sliding_window_view(samples, WINDOW)[::HOP]
    level = 10 * np.log10(np.square(windows).mean(1) + 1e-12)
    loud = level > max(
        QUIET, np.percentile(level, 10) + ABOVE_FLOOR if level.min() < level.max() - ABOVE_FLOOR else QUIET
    )
    found = np.zeros(len(windows), bool)
    lags = np.arange(RATE // PITCH[1], RATE // PITCH[0] + 1)
    for number in np.flatnonzero(loud):
        x = windows[number] - windows[number].mean()
        energy = np.concatenate([[0.0], np.cumsum(np.square(x))])
        power = np.fft.irfft(np.square(np.abs(np.fft.rfft(x, 2 * WINDOW))))[lags]
        both = np.sqrt(energy[WINDOW - lags] * (energy[WINDOW] - energy[lags]))
        found[number] = (power / np.maximum(both, 1e-9)).max() >= VOICED
    return found


def state_of_sound(sound: np.ndarray, start: float, stop: float, heard: list[np.ndarray] | None = None) -> str:
    """The state during a stretch of a recording, ``start`` to ``stop`` in seconds.

    ``sound`` is ``(channels, N)`` at 16 kHz, ``heard`` what :func:`voiced` says of each. Of two channels the left one is the
    voice of who is shown and the right one whom it listens to. Of one channel a pause of up to two seconds after speech is
    listening, and a longer one is idle.
    """
    voices = [voiced(channel) for channel in sound] if heard is None else heard

    def speaks(voice: np.ndarray, begin: float, end: float) -> bool:
        part = voice[round(begin * RATE / HOP) : max(round(end * RATE / HOP), round(begin * RATE / HOP) + 1)]
        return len(part) > 0 and bool(part.mean() >= SHARE)

    if speaks(voices[0], start, stop):
        return "speaking"
    if len(voices) == 2:
        return "listening" if speaks(voices[1], start, stop) else "idle"
    before = voices[0][round(max(0.0, start - PAUSE) * RATE / HOP) : round(start * RATE / HOP)]
    return "listening" if before.any() else "idle"
