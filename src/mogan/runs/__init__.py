"""The folder of a training run: checkpoints, journal, what it is made of."""
