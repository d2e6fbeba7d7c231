"""Writes a model as a folder that transformers loads.

A folder with another residual than the standard one contains the modelling files (remote code), and so does
one with residual scaling that could not be moved into the weights (`scale_in_weights`). A model with the
standard residual is exported as one of transformers' own (standard.py), with exceptions (`needs_code`).
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig

from megatron_ladder.errors import UserError
from megatron_ladder.hf.convert import (
    main_dtype,
    megatron_to_hf,
    scale_in_weights,
    written_dtype,
)
from megatron_ladder.hf.end_ids import end_ids as named_ends
from megatron_ladder.hf.end_ids import one_or_several, several
from megatron_ladder.hf.files.ahead import one_ahead
from megatron_ladder.hf.files.output import complete_or_absent, refuse_others, synced_behind
from megatron_ladder.hf.files.stored import bytes_of, is_finite, safetensors_header
from megatron_ladder.hf.modelling.configuration_ladder import LADDERS, LadderConfig
from megatron_ladder.hf.modelling.modeling_side import LadderSideConfig
from megatron_ladder.hf.standard import needs_code, published_name, standard_config
from megatron_ladder.hf.tokenizer import write_tokenizer
from megatron_ladder.json_files import read_json

_HERE = Path(__file__).parent
_MODELLING = _HERE / "modelling"
_MODELLING_FILES = (
    "configuration_ladder.py",
    "modeling_ladder.py",
    "mlp_ladder.py",
    "rotary_ladder.py",
)
_AUTO_MAP = {
    "AutoConfig": "configuration_ladder.LadderConfig",
    "AutoModel": "modeling_ladder.LadderModel",
    "AutoModelForCausalLM": "modeling_ladder.LadderForCausalLM",
}
# Of a model with a side network, with one file more.
_SIDE_FILE = "modeling_side.py"
_SIDE_AUTO_MAP = {
    "AutoConfig": "modeling_side.LadderSideConfig",
    "AutoModel": "modeling_side.LadderSideModel",
    "AutoModelForCausalLM": "modeling_side.LadderSideForCausalLM",
}
_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
_PIECE = 1 << 24  # how many elements are converted, checked and written at a time
CARD_FACTS = ("name", "license", "origin", "data", "training", "limits")


def export_folder(
    tensors: Mapping[str, Any],
    config: LadderConfig,
    tokenizer: Path,
    output_dir: Path,
    *,
    end_ids: Sequence[int] = (),
    begins_with: int | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype | None = torch.bfloat16,
    model_card_facts: Mapping[str, Any] | None = None,
    compare_with: Path | None = None,
) -> Path:
    """Writes a model's folder: configuration, weights, tokenizer, model card and modelling files.

    After an error there is no folder: it is complete or absent.

    Args:
        tensors: megatron-core's whole tensors, by name (`megatron_ladder.hf.convert` lists them). They
            are read one Hugging Face tensor at a time; at most one shard of copies is in memory.
        config: the model's configuration. `eos_token_id` is the token that ends a document.
        tokenizer: a SentencePiece `.model` or a Hugging Face `tokenizer.json`. Or the folder of the model
            from which this one was made: its tokenizer and generation settings are copied unchanged.
        output_dir: made here. It may exist if it is empty.
        end_ids: tokens that end a text, beside those of `config` and of the other model's folder.
        begins_with: the token that documents of the training data began with. None: they began with none.
            The tokenizer puts it before every text. Another model's tokenizer is copied unchanged.
        max_shard_size: a larger model gets several weight files and an index.
        dtype: the dtype of the written weights. None: each keeps its own. config.json then names
            `config.dtype`, or if that is None the dtype of most weights.
        model_card_facts: facts for the model card, all optional: `name`, `license` and `origin` (str;
            `origin` is the architecture of the model from which this one was made), `data` and
            `training` (a table's rows: label -> value), `limits` (a list of sentences).
        compare_with: a folder with weights. No weights are written then: those of this folder must be the
            same, byte by byte.

    Returns:
        `output_dir`.

    Raises:
        UserError: `output_dir` is in use, the tokenizer does not fit, or a weight is NaN, infinite or too
            large for `dtype`, or is not that of `compare_with`.
        ValueError: `tensors` do not fit `config`, `config.eos_token_id` is not set, or a fact is unknown.
    """
    output_dir = Path(output_dir)
    facts = dict(model_card_facts or {})
    if unknown := facts.keys() - set(CARD_FACTS):
        raise ValueError(f"model_card_facts has {sorted(unknown)}: it may have {list(CARD_FACTS)}")
    if not several(config.eos_token_id):
        raise ValueError("config.eos_token_id is not set: it is the id that ends a document")
    dtypes = {tensor.dtype for tensor in tensors.values()} | ({dtype} if dtype else set())
    config, written = scale_in_weights(config, dtypes)
    with complete_or_absent(output_dir) as folder:
        with_code = needs_code(config, own_tokenizer=not Path(tokenizer).is_dir())
        named = dtype or config.dtype or main_dtype(tensors)
        _write_configs(config, named, folder, with_code=with_code)
        if Path(tokenizer).is_dir():
            for path in (path for name in _COPIED for path in Path(tokenizer).glob(name)):
                copy = folder / path.relative_to(tokenizer)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
            _allow_longer_texts(folder, Path(tokenizer), config.max_position_embeddings)
        else:
            write_tokenizer(
                Path(tokenizer),
                folder,
                eos_token_id=several(config.eos_token_id)[0],
                vocab_size=config.vocab_size,
                max_length=config.max_position_embeddings,
                begins_with=begins_with,
            )
        _name_ends(folder, end_ids)
        model_type = config.model_type if with_code else standard_config(config).model_type
        weights = _weights(tensors, config, dtype, max_shard_size, folder, written, model_type)
        if compare_with is not None:
            refuse_others(compare_with, weights)
        else:
            with synced_behind() as sync:
                for file, data in weights:
                    with (folder / file).open("ab") as opened:
                        opened.write(data)
                    sync(folder / file)
        card = model_card(config, named, facts, with_code=with_code)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return output_dir


def model_card(
    config: LadderConfig, dtype: torch.dtype, facts: Mapping[str, Any], *, with_code: bool
) -> str:
    """The text of README.md in an exported folder, from `config` and `facts`.

    Args:
        config: the model's configuration.
        dtype: the dtype of the weights.
        facts: `model_card_facts` of `export_folder`.
        with_code: the folder contains the modelling files.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (Markdown, not HTML)
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    return environment.get_template("model_card.md.jinja").render(
        config=config,
        remote_code=with_code,
        architecture="" if with_code else _architecture(standard_config(config)),
        ladder_layers=config.ladder_layer_indices(),
        experts=config.expert_layers(),
        side=config if isinstance(config, LadderSideConfig) else None,
        other_residual=LADDERS.get(config.residual),
        dtype=_name(dtype),
        facts={name: facts.get(name) for name in CARD_FACTS},
    )


def _architecture(config: PreTrainedConfig) -> str:
    return type(config).__name__.replace("Config", "ForCausalLM")


def _write_configs(
    config: LadderConfig, dtype: torch.dtype, folder: Path, *, with_code: bool
) -> None:
    exported: PreTrainedConfig
    extra: dict[str, Any] = {}
    if not with_code:
        exported = standard_config(config)
        # For programs that read Llama's older fields, such as transformers 4. 5 reads rope_parameters.
        rope = dict(exported.rope_parameters)
        extra["rope_theta"] = rope.pop("rope_theta")
        extra["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    else:
        has_side = isinstance(config, LadderSideConfig)
        exported = type(config).from_dict(config.to_dict())
        extra["auto_map"] = _SIDE_AUTO_MAP if has_side else _AUTO_MAP
        for name in (*_MODELLING_FILES, *([_SIDE_FILE] if has_side else [])):
            shutil.copyfile(_MODELLING / name, folder / name)
    exported.architectures = [_architecture(exported)]
    exported.dtype = dtype
    fields = json.loads(exported.to_json_string()) | extra
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        # generate() needs a token with which it fills finished sequences.
        # Some models give -1 for none.
        pad_token_id=(
            several(config.eos_token_id)[0]
            if config.pad_token_id is None or config.pad_token_id < 0
            else config.pad_token_id
        ),
    ).save_pretrained(folder)


def _allow_longer_texts(folder: Path, original: Path, context: int) -> None:
    """The longest text of a copied tokenizer, where the context is longer than the original model's."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (original / "config.json").is_file():
        return
    before = read_json(original / "config.json", "a model's configuration")
    fields = read_json(path, "a tokenizer's settings")
    old, longest = before.get("max_position_embeddings"), fields.get("model_max_length")
    if type(old) is int and old < context and type(longest) is int and longest < context:
        fields["model_max_length"] = context
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def _name_ends(folder: Path, more: Sequence[int]) -> None:
    """All end tokens in generation_config.json, where transformers and vLLM look for them."""
    path = folder / "generation_config.json"
    fields = read_json(path, "a model's settings for generation")
    ends = tuple(dict.fromkeys((*named_ends(folder), *more)))
    if set(several(fields.get("eos_token_id"))) != set(ends):
        fields["eos_token_id"] = one_or_several(ends)
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _weights(
    tensors: Mapping[str, Any],
    config: LadderConfig,
    dtype: torch.dtype | None,
    max_shard_size: str,
    folder: Path,
    written: Callable[[str, Tensor], Tensor],
    model_type: str,
) -> Iterator[tuple[str, bytes | memoryview]]:
    """What the weight files hold: a file's name and bytes to append to it. Writes the index, if any."""
    # The plan of the files is made from tensors without data, so that no weight is read yet.
    without_data = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    planned = {
        published_name(name, model_type): torch.empty(
            tensor.shape, dtype=written_dtype(name, tensor.dtype, dtype), device="meta"
        )
        for name, tensor in megatron_to_hf(without_data, config)
    }
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    file_of = plan.tensor_to_filename
    for file, names in plan.filename_to_tensors.items():
        header = safetensors_header({name: planned[name] for name in names})
        yield file, header
    # The plan lists tensors in the order in which `megatron_to_hf` yields them. So each tensor is appended
    # to its file.
    stream = tqdm(
        one_ahead(megatron_to_hf(tensors, config)),
        desc="exporting",
        unit=" tensors",
        total=len(planned),
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    for name, tensor in stream:
        published = published_name(name, model_type)
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            converted = _converted(written(name, piece), planned[published].dtype, published)
            yield file_of[published], bytes_of(converted)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": file_of}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _converted(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    result = piece.to(dtype)
    if is_finite(result):
        return result
    if is_finite(piece):
        raise UserError(f"{name} has values too large for {_name(dtype)}: export as bf16 or fp32")
    raise UserError(
        f"{name} holds NaN or infinite values: nothing was written; export an earlier checkpoint, "
        "RUN/checkpoints/step_N"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
