"""The one exception of this package."""


class DataError(ValueError):
    """A fault in the user's data or its settings.

    The message is one paragraph that says what, where and what to do.
    """
