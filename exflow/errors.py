"""The one error that means: the user's input is at fault, not the program."""


class InputError(ValueError):
    """Bad input: a missing, truncated or mismatched file, an impossible setting, an unwritable output.

    The message is one line that names the file or setting, the value found and the remedy. The command
    line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    """Itself, or its escape: what is quoted from a file must not break the line or steer a terminal."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()
