"""Studies: the paper's tables and the methods compared at lab scale, with training seeds and intervals, each from one command."""
