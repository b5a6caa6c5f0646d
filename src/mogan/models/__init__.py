"""Wan and its parts: transformer, autoencoder, text, discriminator, adapters; how a folder of them is read."""
