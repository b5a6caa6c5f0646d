"""Students go out and come in: export, import, and what other programs call things."""
