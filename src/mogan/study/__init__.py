"""Studies: the paper's tables at lab scale, with training seeds and intervals, each from one command."""
