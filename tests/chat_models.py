"""A small Llama 3 Instruct: BOS before every text, several tokens that end one, a chat template."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BOS, END_OF_TEXT, HEADER, HEADER_END, END_OF_TURN = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    "<|eot_id|>",
)
SPECIAL = (BOS, END_OF_TEXT, HEADER, HEADER_END, END_OF_TURN)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
PROMPT = "the quick brown fox"
MESSAGES = [{"role": "user", "content": "quick brown"}]
CONTEXT = 256
WORDS = (
    "the quick brown fox jumps over a lazy dog while seven tiny otters build ladders near rivers"
)


def tokenizer_json(*, begins: bool = True) -> Tokenizer:
    """A byte-level BPE with Llama 3's special tokens; `begins`: it puts BOS before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    plain = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = plain
    if begins:
        bos = tokenizer.token_to_id(BOS)
        template = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
        )
        tokenizer.post_processor = processors.Sequence([plain, template])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """There is no token to pad with, as in Llama 3."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END_OF_TEXT,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_chat_model(folder: Path) -> Path:
    """Greedily, a chat's answer and a prompt's continuation each end by a turn's end, not a text's."""
    tokenizer = tokenizer_json()
    write_tokenizer(folder, tokenizer)
    size = tokenizer.get_vocab_size()
    text_end, turn_end = (tokenizer.token_to_id(t) for t in (END_OF_TEXT, END_OF_TURN))
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=text_end,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
        model.lm_head.weight[[tokenizer.token_to_id(t) for t in SPECIAL]] = 0
        # Bytes that are no character would make texts that are hard to compare.
        model.lm_head.weight[: len(pre_tokenizers.ByteLevel.alphabet())] = 0
        # Where a chat's seventh token was to be, a turn's end is now.
        own = AutoTokenizer.from_pretrained(folder)
        ids = own.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        new = model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None)[0]
        model.lm_head.weight[turn_end] = 1.05 * model.lm_head.weight[new[-1]]
    model.save_pretrained(folder)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": [text_end, turn_end]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder
