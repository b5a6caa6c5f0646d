"""What calls of the networks cost: the real ones, run on tensors without contents."""
