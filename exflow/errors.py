"""Errors that end a command with a one-line message: bad input, or a wrong result."""

import re


class InputError(ValueError):
    """Bad input: a missing, truncated or mismatched file, an impossible setting, an unwritable output.

    The message is one line that names the file or setting, the value found and the remedy. The command
    line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(map(_printable, message)))


class WrongResult(ArithmeticError):
    """A computed result is wrong: it is NaN or infinite, or a check contradicts it.

    The message is one line that names the place (sequence, step) and the value found there. The command line
    prints it without a traceback and exits with code 1.
    """


def out_of_memory(error: Exception) -> str | None:
    """A one-line message if `error` reports a lack of memory; None for any other error."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, for GPUs
    if not (named or "can't allocate memory" in str(error)):  # torch's words on CPUs
        return None
    amount = re.search(r"allocate (\d[\d.]* \w+)", str(error))
    wanted = f" ({amount[1]} more were asked for)" if amount else ""
    return f"out of memory{wanted}; give it less to do at a time, or more ranks, or more memory"


def _printable(character: str) -> str:
    """The character, or its escape: text quoted from a file must not break the line or control a terminal."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()
