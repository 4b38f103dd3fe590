"""Decoding of text files: UTF-8 is read, and any other encoding is named in the error."""

import codecs

_MARKS = {  # longer marks first: the UTF-32-LE mark begins with the UTF-16-LE one
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def wide_encoding(start: bytes) -> str | None:
    """Detect UTF-16 or UTF-32 from a text's first four bytes: a byte-order mark, or zeros around ASCII."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name
    zeros = [byte == 0 for byte in start[:4]]
    if zeros in ([False, True, True, True], [True, True, True, False]):
        return "UTF-32"
    return "UTF-16" if zeros in ([False, True, False, True], [True, False, True, False]) else None


def utf8_text(content: bytes) -> str:
    """The text, without a byte-order mark. Raises ValueError unless it is UTF-8; names UTF-16 and UTF-32."""
    wide = wide_encoding(content)
    if wide is not None:
        raise ValueError(f"it is {wide} text; save it as UTF-8")
    return content.decode("utf-8-sig")
