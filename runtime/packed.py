"""Answers in gzip, unpacked piece by piece: never more memory than a piece, never more bytes than the file may have."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from edgead.runtime.errors import FetchContentError
from edgead.runtime.fetch_rules import cut, packed_most, shown, too_long

_GZIP = 16 + zlib.MAX_WBITS
_PIECE = 64 * 2**10


def unpacked(pieces: Iterable[bytes], url: str, end: int | None, most: int) -> Iterator[bytes]:
    """The content of a gzip stream of one or several members (RFC 1952).

    Args:
        pieces: of the stream, as they come.
        url: of the file, for messages.
        end: bytes of the stream, if the server said so.
        most: bytes that the content may have.

    Raises:
        FetchContentError: no gzip, damaged, not whole, followed by something else; or more than `most` bytes, of which
            at most one is made.
        FetchError: the connection ended early.
    """
    decoder, began, came, made = zlib.decompressobj(_GZIP), False, 0, 0
    for piece in pieces:
        came += len(piece)
        if came > packed_most(most):
            raise too_long(shown(url), most)
        while True:
            if decoder.eof:
                if not piece:
                    break
                decoder, began = zlib.decompressobj(_GZIP), False
            limit = min(_PIECE, most - made + 1)
            try:
                data = decoder.decompress(piece, limit)
            except zlib.error as error:
                raise _broken(url, str(error)) from error
            began = began or bool(piece)
            made += len(data)
            if made > most:
                raise too_long(shown(url), most)
            if data:
                yield data
            piece = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if not piece and len(data) < limit:
                break
    if end is not None and came < end:
        raise cut(url, came, end)
    if not decoder.eof or not began:
        raise _broken(url, f"the end after {came} bytes")


def _broken(url: str, got: str) -> FetchContentError:
    return FetchContentError(
        wanted=f"{shown(url)} as one whole gzip stream, as its Content-Encoding says",
        got=got[:200],
        next_step="Check the compression of the server or cache; it is asked for the file as it is from now on.",
    )


__all__ = ["unpacked"]
