"""MoGAN: post-train few-step video generators so that they move well."""

__version__ = "0.2.0"
