"""Metrics on folders of clips.

Pure functions of frames and flows, one noun per module; :mod:`mogan.evaluation.evaluate` runs them over folders and
writes ``results.json``. Frames are uint8 ``(H, W, 3)`` RGB and come as any iterable, so a long file is never held in
memory.
"""
