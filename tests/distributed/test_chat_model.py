"""A chat model of others, with several end tokens and BOS before a text: transformers on the same folder is
the oracle, through import, export, generate, serve and evaluation."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ladder.hf.end_ids import end_ids
from megatron_ladder.hf.generate import generate_text
from pretrain import cli
from pretrain.convert.plain_model import load_plain_model
from tests.chat_models import CONTEXT, END_OF_TEXT, END_OF_TURN, MESSAGES, PROMPT, write_chat_model
from tests.distributed.test_serving import serving

ORIGIN = "http://localhost:3000"
MANY = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    assert cli.main(["import", str(folder), str(folder.parent / "run")]) == 0
    return folder.parent / "run"


class Oracle:
    """transformers, greedily."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder)

    def prompt(self, text: str = PROMPT, **how: Any) -> str:
        return self._text(self.tokenizer(text, return_tensors="pt").input_ids, **how)

    def chat(self, **how: Any) -> str:
        return self._text(self.chat_ids(), **how)

    def chat_ids(self) -> torch.Tensor:
        how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return self.tokenizer.apply_chat_template(MESSAGES, **how)["input_ids"]

    def _text(self, ids: torch.Tensor, **how: Any) -> str:
        how = {"max_new_tokens": MANY, "do_sample": False, "pad_token_id": 0} | how
        new = self.model.generate(ids, **how)[0, ids.shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    made = Oracle(folder)
    # What the tests rest on: a turn's end ends both, and BOS matters.
    assert made.prompt() != made.prompt(eos_token_id=None)
    assert made.chat() != made.chat(eos_token_id=made.tokenizer.eos_token_id)
    without = made.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    assert made.prompt() != made._text(without)
    return made


@pytest.fixture(scope="module", params=["folder", pytest.param("run", marks=pytest.mark.slow)])
def address(folder: Path, run: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    model = {"folder": folder, "run": run}[request.param]
    with serving(model, "--served-model-name", "a/b", "--allow-origins", ORIGIN) as (address, _):
        yield address


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


HOW = {"model": "a/b", "temperature": 0}


def test_openais_client_gets_what_transformers_gives(client: openai.OpenAI, oracle: Oracle) -> None:
    completed = client.completions.create(**HOW, prompt=PROMPT, max_tokens=MANY)
    assert completed.choices[0].text == oracle.prompt()
    assert completed.choices[0].finish_reason == "stop"
    assert completed.usage.prompt_tokens == len(oracle.tokenizer(PROMPT).input_ids)
    empty = client.completions.create(**HOW, prompt="", max_tokens=MANY)  # BOS alone
    assert empty.choices[0].text == oracle.prompt("")

    chat = client.chat.completions.create(**HOW, messages=MESSAGES)
    assert chat.choices[0].message.content == oracle.chat()
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.prompt_tokens == oracle.chat_ids().shape[1]
    pieces = list(client.chat.completions.create(**HOW, messages=MESSAGES, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == oracle.chat()
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_fields_of_other_servers(client: openai.OpenAI, oracle: Oracle) -> None:
    def chat(**more: Any) -> tuple[str, str]:
        how = {**HOW, "max_tokens": 20, **more}
        choice = client.chat.completions.create(
            messages=MESSAGES, **{k: v for k, v in how.items() if k in ("model", "stop", "top_p")},
            temperature=how["temperature"], max_tokens=20,
            extra_body={k: v for k, v in how.items() if k not in (*HOW, "stop", "max_tokens", "top_p")},
        ).choices[0]  # fmt: skip
        return choice.message.content or "", choice.finish_reason

    tokens = oracle.tokenizer
    whole = oracle.chat(eos_token_id=None, max_new_tokens=20)
    second = oracle.model.generate(oracle.chat_ids(), max_new_tokens=2, do_sample=False)[0, -1]
    turn_end = tokens.convert_tokens_to_ids(END_OF_TURN)
    assert chat(stop_token_ids=[int(second)]) == (oracle.chat(max_new_tokens=1), "stop")
    assert chat(ignore_eos=True) == (whole, "length")
    assert chat(ignore_eos=True, stop=[END_OF_TURN]) == (oracle.chat(), "stop")
    assert chat(ignore_eos=True, stop_token_ids=[turn_end]) == (oracle.chat(), "stop")
    expected = oracle.chat(min_new_tokens=15, max_new_tokens=20)
    assert chat(min_tokens=15)[0] == expected != oracle.chat()
    expected = oracle.chat(repetition_penalty=1.3, max_new_tokens=20)
    assert chat(repetition_penalty=1.3)[0] == expected != oracle.chat()
    for top_k in (-1, 0, 10**6):
        assert chat(top_k=top_k) == (oracle.chat(), "stop")
    assert chat(temperature=1.5, top_p=0.8, top_k=1) == (oracle.chat(), "stop")
    chat(temperature=1.5, top_p=0.8, top_k=20)
    for neutral in (
        {"guided_regex": None},
        {"functions": []},
        {"tool_choice": "none"},
        {"min_p": 0},
    ):
        assert chat(**neutral) == (oracle.chat(), "stop")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"guided_regex": "a+"}, "guided_regex is not supported"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs is not supported"),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"frequency_penalty": 0.1}, "frequency_penalty is not supported"),
        ({"max_token": 3}, "max_token is not supported"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids contains token id 1000000"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids.0"),
        ({"min_tokens": 30, "max_tokens": 20}, "min_tokens is 30"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0: it is 0.01 to 100"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty is 1e-320"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
        (
            {"messages": [{"role": "user", "content": "a \ud83d b"}]},
            "Invalid JSON: unexpected end of hex escape",
        ),
        ({"top_k": -2}, "top_k"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template is not supported"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "tools are not supported"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "tools are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0: content of type image_url is not supported",
        ),
    ],
)
def test_what_is_not_done_is_refused(address: str, field: dict, said: str) -> None:
    body = {"model": "a/b", "messages": MESSAGES, "max_tokens": 2, **field}
    answer = httpx.post(
        f"{address}/v1/chat/completions",
        content=json.dumps(body),  # \ud83d is sent as it is written
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]
    completion = {"model": "a/b", "prompt": PROMPT, "logprobs": 0}  # the tokens' own
    assert httpx.post(f"{address}/v1/completions", json=completion).status_code == 400


def test_no_content_is_an_empty_text(client: openai.OpenAI, address: str) -> None:
    def tokens(**assistant: Any) -> int:
        said = [*MESSAGES, {"role": "assistant", **assistant}, *MESSAGES]
        body = {**HOW, "messages": said, "max_tokens": 1}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        return answer.json()["usage"]["prompt_tokens"]

    assert tokens(content=None) == tokens(content="") == tokens() == tokens(content=[])
    parts = [{"type": "text", "text": "quick"}, {"type": "text", "text": " fox"}]
    assert tokens(content=parts) == tokens(content="quick fox") > tokens(content="")


def test_a_client_looks_a_model_up(client: openai.OpenAI) -> None:
    found = client.models.retrieve("a/b")
    assert (found.id, found.object) == ("a/b", "model")
    assert found.max_model_len == CONTEXT
    assert [found] == list(client.models.list())
    with pytest.raises(openai.NotFoundError, match="no model 'a'"):
        client.models.retrieve("a")


def test_web_pages_of_an_allowed_origin_may_ask(address: str) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    path = f"{address}/v1/chat/completions"
    allowed = httpx.options(path, headers={"Origin": ORIGIN, **asked})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert httpx.options(path, headers={"Origin": "http://other", **asked}).status_code == 400
    body = {**HOW, "messages": MESSAGES, "max_tokens": 1}
    for change in ({}, {"n": 99}, {"model": "x"}, {"user": "y" * (5 << 20)}):
        answer = httpx.post(path, json={**body, **change}, headers={"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN, change


@pytest.mark.parametrize("batching", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_generate(batching: str, folder: Path, run: Path, oracle: Oracle) -> None:
    """Two prompts, and no token to pad the shorter one with."""
    prompts = ["near", PROMPT]
    expected = [prompt + oracle.prompt(prompt) for prompt in prompts]
    assert generate_text(folder, prompts, max_new_tokens=MANY) == expected
    command = [sys.executable, "-m", "pretrain.cli", "generate", str(run), "--prompt", *prompts]
    command += ["--max-new-tokens", str(MANY), "--batching", batching]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stdout == ("\n" + "-" * 80 + "\n").join(expected) + "\n", done.stderr


def test_export_names_every_end(run: Path, folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    """vLLM and transformers look for them in generation_config.json."""
    tokens = oracle.tokenizer
    ends = [tokens.convert_tokens_to_ids(name) for name in (END_OF_TEXT, END_OF_TURN)]
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    # A folder that names them in config.json alone, beside a file that names none.
    run = Path(shutil.copytree(run, tmp_path / "run"))
    for name, value in (("config.json", ends), ("generation_config.json", None)):
        path = run / "imported" / name
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"eos_token_id": value, "top_k": 7}))
    assert cli.main(["export", str(run), str(tmp_path / "again")]) == 0
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written["eos_token_id"] == ends and written["top_k"] == 7
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.generation_config.eos_token_id == ends
    assert end_ids(tmp_path / "again") == tuple(ends)
    (text,) = generate_text(tmp_path / "again", [PROMPT], max_new_tokens=MANY)
    assert text == PROMPT + oracle.prompt()


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_evaluation_reads_text_as_transformers_does(
    kind: str, folder: Path, run: Path, oracle: Oracle
) -> None:
    text = load_plain_model({"folder": folder, "run": run}[kind]).text
    theirs = oracle.tokenizer
    assert text.begin_ids == [theirs.bos_token_id]
    for sample, special in itertools.product(("", PROMPT, f"a{END_OF_TURN}b"), (True, False)):
        expected = theirs.encode(sample, add_special_tokens=special)
        assert text.tokenizer.encode(sample, add_special_tokens=special).ids == expected
    assert set(text.end_ids) == {
        theirs.convert_tokens_to_ids(name) for name in (END_OF_TEXT, END_OF_TURN)
    }
