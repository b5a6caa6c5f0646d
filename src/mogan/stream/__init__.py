"""Watch what a causal student makes while it makes it."""
