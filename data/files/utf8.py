"""Decode the bytes of a text file as UTF-8."""

import io

from data.files.raw import UTF8_BOM, head_of


def skip_mark(handle: io.BufferedReader) -> int:
    """Skip a byte order mark of UTF-8.

    Args:
        handle: The stream, at its beginning.

    Returns:
        The bytes skipped.

    Raises:
        ValueError: The text is UTF-16, or not a text.
    """
    head = head_of(handle)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("UTF-16 from byte offset 0 on; save the file as UTF-8")
    if b"\0" in head[:2]:
        bad = f"NUL bytes from byte offset {head.index(0)} on (damaged, or UTF-16)"
        raise ValueError(f"{bad}; save the file again as UTF-8")
    return len(handle.read(len(UTF8_BOM))) if head.startswith(UTF8_BOM) else 0


def decode_utf8(raw: bytes, start: int) -> str:
    """Decode bytes as UTF-8 without NUL.

    Args:
        raw: The bytes.
        start: Their offset in the file.

    Raises:
        ValueError: With the offset of the first bad byte.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{raw[error.start]:02x} at byte offset {start + error.start}"
        raise ValueError(f"not UTF-8: {bad}; save the file as UTF-8") from None
    if "\0" in text:
        bad = f"a NUL byte at byte offset {start + raw.index(0)} (damaged, or UTF-16)"
        raise ValueError(f"{bad}; save the file again as UTF-8")
    return text
