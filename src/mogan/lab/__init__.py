"""The laboratory: a rendered world whose truth is known, and a complete tiny Wan family that lives in it."""
