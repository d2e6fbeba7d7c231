"""From tokens that come one by one to text: whole characters only, and nothing of a stop sequence."""

from collections.abc import Sequence

from tokenizers import Tokenizer


class TextStream:
    """The text of one continuation.

    Args:
        prompt_ids: tokens before it, whose text is not given; some tokenizers drop a space at the start.
        stop: texts that end it; none of them is given.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        # The last few are enough context for any tokenizer, and long prompts stay cheap.
        self._ids = list(prompt_ids)[-8:]
        self._before = self._decode()
        self._given = 0
        self._stop = [text for text in stop if text]
        self.stopped = False
        """A stop sequence has come."""

    def push(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """The text that these tokens add, as far as it is certain."""
        if self.stopped:
            return ""
        self._ids += ids
        text = self._decode()
        # A prompt that ends within a character: the text before it is another then.
        common = len(self._before) if text.startswith(self._before) else _common(text, self._before)
        text = text[common:]
        if ends := [found for stop in self._stop if (found := text.find(stop)) >= 0]:
            self.stopped = True
            text = text[: min(ends)]
        elif not is_last:
            text = text[: len(text) - self._uncertain(text)]
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _uncertain(self, text: str) -> int:
        """Characters at the end that later tokens may change, or that may begin a stop sequence."""
        whole = text.rstrip("\ufffd")  # bytes of a character that is not complete
        held = len(text) - len(whole)
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(whole)), 0, -1):
                if whole.endswith(stop[:size]):
                    held = max(held, len(text) - len(whole) + size)
                    break
        return held

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


def _common(a: str, b: str) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
