"""Students and teachers make clips."""
