"""Where a model's texts begin and end, and its tokenizer: of runs and of Hugging Face folders alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from megatron_ladder.errors import UserError
from megatron_ladder.hf.end_ids import end_ids
from megatron_ladder.hf.tokenizer import sentencepiece_to_tokenizers
from megatron_ladder.inference.requests import check_text
from pretrain.convert.import_tokenizer import has_tokenizer
from pretrain.data.folders import DataFolder


@dataclass(frozen=True)
class ModelText:
    """How text becomes a model's tokens."""

    tokenizer: Tokenizer
    """`encode(text)` puts before a text what the model expects there."""
    end_ids: tuple[int, ...]
    """Any of them ends a text; the first one stands between two documents of the training data."""

    def prompt_ids(self, text: str, *, is_rendered: bool = False) -> list[int]:
        """A prompt's ids.

        Args:
            is_rendered: by a chat template, which writes itself what stands before a text.

        Raises:
            UserError: it is no Unicode text.
        """
        check_text(text)
        # A batch: other threads go on meanwhile. Fast: without the tokens' places in the text.
        batch = self.tokenizer.encode_batch_fast([text], add_special_tokens=not is_rendered)
        return batch[0].ids

    @property
    def begin_ids(self) -> list[int]:
        """What stands before a text: usually one BOS token, or nothing."""
        return begin_ids(self.tokenizer)


def text_of_folder(folder: Path, file: str) -> ModelText:
    """Of a Hugging Face folder: as transformers reads it.

    Args:
        file: its tokenizer.json or tokenizer.model.
    """
    return ModelText(_theirs(folder, folder / file), end_ids(folder))


def text_of_run(run: Path, data: DataFolder) -> ModelText:
    """Of a run: as its data set was made; of an imported model's, as the folder that it came from says.

    A folder without a tokenizer says only where a text ends.

    Args:
        data: what the run keeps of its first data set.
    """
    file, imported = data.path / data.tokenizer["file"], run / "imported"
    ends = tuple(dict.fromkeys((data.tokenizer["eod_id"], *end_ids(imported))))
    if has_tokenizer(imported):
        return ModelText(_theirs(imported, file), ends)
    tokenizer = load_tokenizer(file)
    _begin_with(tokenizer, data.tokenizer.get("bos_id"))
    return ModelText(tokenizer, ends)


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """What a tokenizer puts before every text."""
    text = "a"
    whole = tokenizer.encode(text).ids
    alone = tokenizer.encode(text, add_special_tokens=False).ids
    starts = range(len(whole) - len(alone) + 1)
    return whole[: next((i for i in starts if whole[i : i + len(alone)] == alone), 0)]


def load_tokenizer(file: Path) -> Tokenizer:
    """Loads a tokenizer.json, or a SentencePiece .model, as a `Tokenizer`.

    Raises:
        UserError: the file is neither.
    """
    try:
        if file.exists() and not file.is_file():  # reading a pipe could take for ever
            raise ValueError("it is not a regular file")
        if file.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return tokenizer
        proto = ModelProto.FromString(file.read_bytes())
    except Exception as error:  # tokenizers and protobuf raise nothing narrower
        raise UserError(
            f"{file} cannot be read as a tokenizer.json or a SentencePiece model: {error}"
        ) from error
    tokenizer = sentencepiece_to_tokenizers(proto)
    # As in SentencePiece, the characters "</s>" in a text are text, not the special token.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _theirs(folder: Path, file: Path) -> Tokenizer:
    """The tokenizer that transformers makes of a folder's files, or the file itself where it makes none."""
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        tokenizer: Tokenizer = loaded.backend_tokenizer
    except Exception:  # of a folder without the other files; transformers raises all kinds
        return load_tokenizer(file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _begin_with(tokenizer: Tokenizer, bos_id: int | None) -> None:
    """Texts begin with this token and end with none, whatever the file says: so the data were made."""
    tokenizer.post_processor = None
    if bos_id is not None:
        begin = TemplateProcessing(single=["BOS", "$A"], special_tokens=[("BOS", bos_id)])
        tokenizer.post_processor = begin
