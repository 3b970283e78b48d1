"""Which captions are kept and in which form; each filter is an option of its own that the manifest records."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from simla_ds.data.convert.settings import Settings
from simla_ds.data.sample import clean_caption

NEVER_CUT = 1 << 30
"""Words: cutting is the loader's (data.max_words)."""
TIMES_LIKELIER = 20
"""Another language must be so many times as likely as the wanted one: of three words no identifier can be sure."""

_MARKUP = re.compile(r"<(?!person>)/?[a-zA-Z][^<>]{0,200}>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\S+", re.IGNORECASE)
_SPACES = re.compile(r"\s+")
_BOILERPLATE = re.compile(
    r"""stock\ (?:photo|image|illustration|vector|footage)|royalty[ -]free|all\ rights\ reserved|(?:^|\W)(?:copyright|©)
    |getty\ ?images|shutterstock|alamy|dreamstime|istock|click\ (?:here|to\ (?:view|enlarge))|image\ may\ contain
    |(?:image|photo|picture)\ not\ (?:found|available)|no\ (?:description|caption|photo)\ (?:available|provided)
    |^(?:untitled|image|photo|picture|thumbnail|logo|img|slide|figure)\W*\d*\W*$
    |^(?:img|dsc[fn]?|pict|p|screenshot)[ _-]?\d{3,}\S*$|^\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?)$""",
    re.IGNORECASE | re.VERBOSE,
)


class CaptionFilter:
    """Normalises captions and says which are left out, and why."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def __call__(self, caption: str) -> tuple[str, str]:
        """Return (the caption to write, "") or (what was found wanting, the reason)."""
        settings = self.settings
        caption = NORMALISED[settings.captions](caption)
        words = len(caption.split())
        if not words:
            return caption, "caption empty"
        if settings.drop_boilerplate and _BOILERPLATE.search(caption):
            return caption, "caption boilerplate"
        if words < settings.min_words:
            return caption, "caption too short"
        if settings.max_words and words > settings.max_words:
            return caption, "caption too long"
        if settings.language and not in_language(caption, settings.language):
            return caption, "caption in another language"
        return caption, ""


def as_is(caption: str) -> str:
    """Return it unchanged: the loader normalises in any case."""
    return caption


def reference(caption: str) -> str:
    """Return it as the official implementation cleans it, not cut."""
    return clean_caption(caption, NEVER_CUT)


def modern(caption: str) -> str:
    """Return it as text for a tokeniser with case and punctuation: mojibake and entities mended (ftfy), markup,
    addresses and invisible characters removed, white space made single spaces.
    """
    text = _ftfy().fix_text(caption, unescape_html=True, normalization="NFC")
    text = _ADDRESS.sub(" ", _MARKUP.sub(" ", text))
    text = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    return _SPACES.sub(" ", text).strip()


NORMALISED = {"as-is": as_is, "reference": reference, "modern": modern}
"""Settings.captions."""


def in_language(caption: str, language: str) -> bool:
    """Whether the caption may be in a language (ISO 639-1), unless another is TIMES_LIKELIER as likely."""
    likely = dict(_languages().rank(caption))
    return max(likely.values()) <= TIMES_LIKELIER * likely[language]


def require_libraries(settings: Settings) -> None:
    """Raise ValueError when an option needs a package that isn't there, or a language that isn't known."""
    if settings.captions == "modern":
        _ftfy()
    if settings.language and settings.language not in _languages().labels:
        raise ValueError(f"--language {settings.language} is none of {', '.join(sorted(_languages().labels))}")


@lru_cache(maxsize=1)
def _languages() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError("--language needs py3langid; pip install 'simla_ds[data]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=1)
def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise ValueError("--captions modern needs ftfy; pip install 'simla_ds[data]'") from None
    return ftfy
