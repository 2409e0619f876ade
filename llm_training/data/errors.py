"""The exception of this package, and the words of others in it."""


class DataError(ValueError):
    """A fault in the user's data or its settings.

    The message is one paragraph that says what, where and what to do.
    """


def one_line(error: Exception) -> str:
    """What another library said, as one sentence of our paragraph."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
