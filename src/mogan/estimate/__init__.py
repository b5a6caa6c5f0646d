"""Memory, time and cost of a recipe on a machine, before paying for it: real shapes, no weights, no GPU."""
