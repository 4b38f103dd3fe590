"""Which encoding the bytes of a text are in: UTF-8 is read, another is named."""

import codecs

_MARKS = {  # the longer ones first: a mark of UTF-16 begins one of UTF-32
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def wide_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32, where a text's first four bytes tell it: by a mark, or by the zeros around ASCII."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name
    zeros = [byte == 0 for byte in start[:4]]
    if zeros in ([False, True, True, True], [True, True, True, False]):
        return "UTF-32"
    return "UTF-16" if zeros in ([False, True, False, True], [True, False, True, False]) else None


def utf8_text(content: bytes) -> str:
    """The text, without a byte-order mark. ValueError, saying what it is, unless it is UTF-8."""
    wide = wide_encoding(content)
    if wide is not None:
        raise ValueError(f"it is {wide} text; save it as UTF-8")
    return content.decode("utf-8-sig")
