"""A config becomes live networks, and they are trained."""
