"""The one exception meant for users."""


class GossamerError(Exception):
    """A fault the user can mend; its text is one clear line."""
