"""Quality rules that need no knowledge of the language: Gopher's and FineWeb's, by `datatrove`.

datatrove is the library that FineWeb was made with. Its filters are used here, on one text at a time; its
pipelines are not, as they run jobs in a way of their own. The filters count words with spaCy, which is
large and slow (3 MB/s). Here a word is a run of letters and digits, so the rules are right for languages
that write spaces between words.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from data_prep.errors import UserError

Quality = Literal["gopher-quality", "gopher-repetition", "fineweb"]
Judge = Callable[[str], str | None]
"""Returns the reason why a text is dropped, or None."""

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]+")
_EXTRA = "pip install 'megatron-ladder[clean]'"


def make_judge(
    quality: Sequence[Quality], min_characters: int | None, max_characters: int | None
) -> Judge:
    """A function that returns the reason of the first rule that drops a text.

    Args:
        quality: Gopher's document rules (arXiv 2112.11446, A.1.1: words, mean word length, symbols,
            bullets, ellipses, letters; its English stop words are left out), its repetition rules
            (table A1), FineWeb's (arXiv 2406.17557, 3.6).
    """
    filters = [(name, make_filter(name)) for name in quality]

    def judge(text: str) -> str | None:
        if not text.strip():
            return "empty"
        if min_characters is not None and len(text) < min_characters:
            return "fewer than --min-characters"
        if max_characters is not None and len(text) > max_characters:
            return "more than --max-characters"
        for name, filter_ in filters:
            if (reason := filter_(text)) is not None:
                return f"{name}: {reason}"
        return None

    return judge


def make_filter(name: Quality) -> Judge:
    """One of datatrove's filters; reasons are its own names.

    Raises:
        UserError: datatrove is not installed.
    """
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters
    except ImportError as error:
        raise UserError(f"--quality needs datatrove ({error}): {_EXTRA}") from error
    # In place of a language's name, datatrove takes a word splitter.
    words: Any = _words()
    made = {
        "gopher-quality": lambda: filters.GopherQualityFilter(min_stop_words=None, language=words),
        "gopher-repetition": lambda: filters.GopherRepetitionFilter(language=words),
        "fineweb": lambda: filters.FineWebQualityFilter(language=words),
    }[name]()

    def judge(text: str) -> str | None:
        if not _WORD.search(text):
            return "no words"  # datatrove would divide by zero
        verdict = made.filter(Document(text=text, id=""))
        return verdict[1] if isinstance(verdict, tuple) else None

    return judge


@functools.cache
def _words() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    return Words()
