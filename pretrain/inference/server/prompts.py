"""Prompts become tokens, in time and memory that do not depend on how long a text a client sends."""

from megatron_ladder.errors import UserError
from megatron_ladder.inference.requests import check_text
from pretrain.convert.model_text import ModelText

PIECE = 1 << 16
"""Characters. The tokenizer keeps a hundred bytes and more for each token of the text that it encodes."""


def encode(text: ModelText, prompt: str, most: int, *, is_rendered: bool = False) -> list[int]:
    """A prompt's ids.

    A text that is much too long is not encoded as a whole. The tokens of its pieces are counted until they
    are twice as many as may be. (Not once, because a cut between two pieces may add a few.)

    Args:
        most: the tokens that a request may have.
        is_rendered: by a chat template, which writes itself what stands before a text.

    Raises:
        UserError: it is no Unicode text, or much too long. Not every text that is too long is found here.
    """
    check_text(prompt)
    if len(prompt) > PIECE:
        count = 0
        for begin in range(0, len(prompt), PIECE):
            piece = prompt[begin : begin + PIECE]
            (found,) = text.tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            count += len(found.ids)
            if count > 2 * most:
                raise UserError(
                    f"a prompt of {len(prompt):,} characters exceeds the {most} tokens that a request may "
                    "have: shorten the prompt"
                )
    return text.prompt_ids(prompt, is_rendered=is_rendered)
