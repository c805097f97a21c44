"""What joins a text and its continuation: a space, or nothing.

The text's last character decides. This module imports nothing of the project.
"""

from __future__ import annotations

import unicodedata

__all__ = ["separates_words", "separator"]

_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x19E0, 0x19FF),  # Khmer symbols
    (0x2E80, 0x312F),  # Chinese radicals and punctuation, Hiragana, Katakana, Bopomofo
    (0x3190, 0x4DBF),  # the same, more of it; Chinese characters
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),  # Burmese, more of it
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),  # punctuation of vertical lines
    (0xFF00, 0xFF9F),  # full-width letters and punctuation, half-width Katakana
    (0x1B000, 0x1B16F),  # Hiragana and Katakana, more of them
    (0x20000, 0x3FFFF),  # Chinese characters, more of them
)
"""First and last code points of scripts that write words without spaces."""
_ZERO_WIDTH_SPACE = "\u200b"
"""It separates words in Thai, Khmer and Burmese."""
_STRAIGHT_QUOTES = "\"'`"
_QUOTES = _STRAIGHT_QUOTES + "“”„‟‘’‚‛«»‹›"
_PARTNERS = {"”": "“„‟", "“": "„", "’": "‘‚‛", "‘": "‚", "»": "«", "«": "»", "›": "‹", "‹": "›"}
"""By closing quote, the opening quotes that it matches in some language."""
_OPENING = "¿¡"
_BEFORE_AN_OPENING_QUOTE = ":=,-–—"
"""A quote after one of these opens, as it does after white space, an opening bracket or another opening quote."""


def separator(text: str) -> str:
    """What joins ``text`` to a continuation: ``" "`` or ``""``.

    No space follows white space, an opening quote or bracket, and Chinese, Japanese, Thai, Lao, Khmer and Burmese. A
    quote opens if it is at the beginning or follows white space, an opening quote or bracket, or one of ``: = , - –
    —``, and if it closes no earlier quote.

    >>> separator("The Louvre is in"), separator("### Response:\\n"), separator("卢浮宫位于")
    (' ', '', '')
    >>> separator('{"country": "'), separator('He said "yes"')
    ('', ' ')
    """
    if not text:
        return ""
    return "" if text[-1].isspace() or _opens(text) or not separates_words(text[-1]) else " "


def separates_words(character: str) -> bool:
    """Whether a space may follow a character: false for scripts that write words without spaces."""
    code = ord(character)
    return character != _ZERO_WIDTH_SPACE and not any(first <= code <= last for first, last in _WITHOUT_SPACES)


def _opens(text: str) -> bool:
    """Whether the last character is an opening quote or bracket."""
    last, before = text[-1], text[:-1]
    if last not in _QUOTES:
        return last in _OPENING or unicodedata.category(last) == "Ps"
    at_a_start = not before or before[-1].isspace() or before[-1] in _BEFORE_AN_OPENING_QUOTE or _opens(before)
    return at_a_start and not _closes(last, before)


def _closes(quote: str, before: str) -> bool:
    """Whether a quote with a space before it (French « ainsi ») closes an earlier one."""
    partners = _PARTNERS.get(quote, "")
    return sum(map(before.count, partners)) > before.count(quote)
