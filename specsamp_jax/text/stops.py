"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopStream:
    r"""Passes a text on up to its first stop string, no piece of which is ever returned.

    A suffix that could begin a stop string is held back until the text goes on differently or ends. The first stop
    string is the one that ends first, of several the longest, so the result does not depend on how the text is cut
    into pieces.

    Args:
      stops: The stop strings, none of them empty.

    Attributes:
      stopped: The stop string that ended the text; None before that.

    Raises:
      ValueError: A stop string is empty.

    Example:
      >>> stream = StopStream(["END", "\n\n"])
      >>> [stream.push(piece) for piece in ("One", "\n", "T", "EN", "T", "E", "ND", "more")], stream.stopped
      (['One', '', '\nT', '', 'ENT', '', '', ''], 'END')
    """

    def __init__(self, stops: Sequence[str]):
        if not all(stops):
            raise ValueError(f"stops must hold texts of one character or more, got {list(stops)}.")
        self.stopped: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Returns the text that cannot belong to a stop string any more, possibly empty; nothing after one."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self.stopped = min(found)
            self._held = ""
            return text[: end - len(self.stopped)]
        self._held = text[len(text) - self._num_held(text) :]
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """Returns the text held back so far; call it after the last piece."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
