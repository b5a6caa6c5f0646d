"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """A mistake in what the user gave. The message is one sentence that says the fix; the CLI prints it and exits with 2."""
