"""Turns tokens that come one by one into text: whole characters only, and no part of a stop sequence."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_CONTEXT = 8
_INCOMPLETE = "\ufffd"  # stands for the bytes of an incomplete character


class TextStream:
    """The text of one continuation. A token takes the same time however many there have been.

    Args:
        tokenizer: the model's.
        prompt_ids: the tokens before the continuation. They are decoded with it, since some tokenizers drop
            a space at the start of a text; but their own text is not returned.
        stop: texts that end the continuation; they are not returned.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        # The last few tokens are enough context for any tokenizer, and decoding them is cheap.
        self._begin_after(list(prompt_ids)[-_CONTEXT:])
        self._settled = ""
        self._given = 0
        self._stop = [text for text in stop if text]
        self.stopped = False
        """Whether a stop sequence has been found."""

    def _begin_after(self, context: list[int]) -> None:
        """From here on tokens are decoded after these alone."""
        self._ids = context
        self._context = len(context)
        self._before = self._decode()

    def push(self, ids: Sequence[int], *, is_last: bool = False) -> str:
        """The text that these tokens add, without an end that later tokens may still change.

        Args:
            ids: the next tokens.
            is_last: no more tokens follow, so all text is returned.
        """
        if self.stopped:
            return ""
        self._ids += ids
        text = self._decode()
        # Where the prompt ends within a character, the new tokens change the end of the prompt's text.
        common = len(self._before) if text.startswith(self._before) else _common(text, self._before)
        is_settled = text[common:][-1:] not in ("", _INCOMPLETE)
        text = whole = self._settled + text[common:]
        if ends := [found for stop in self._stop if (found := text.find(stop)) >= 0]:
            self.stopped = True
            text = text[: min(ends)]
        elif not is_last:
            text = text[: len(text) - self._uncertain(text)]
        new, self._given = text[self._given :], max(self._given, len(text))
        # Else each token would take longer than the one before it: all of them would be decoded again.
        if is_settled and len(self._ids) >= self._context + _CONTEXT:
            self._settled, self._given = whole[self._given :], 0
            self._begin_after(self._ids[self._context :])
        return new

    def _uncertain(self, text: str) -> int:
        """The number of characters at the end that later tokens may change, or make a stop sequence."""
        whole = text.rstrip(_INCOMPLETE)
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
    """The number of characters at the beginning that both texts share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
