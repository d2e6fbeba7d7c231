"""`megatron-ladder serve`, as its users meet it: OpenAI's client, bad requests, clients that go away."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from megatron_ladder.config import ModelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.hf.convert import hf_to_megatron
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.generate import generate_text
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from pretrain import cli
from tests.ports import free_port
from tests.unit.hf.tiny import VOCAB, train_sentencepiece

CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT = "the first time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported ladder model with experts in some layers, whose text varies, with a chat template."""
    place = tmp_path_factory.mktemp("served")
    tokenizer = train_sentencepiece(place, "bpe")
    model = ModelConfig(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        ladder_layers=3,
        share_embeddings_and_output_weights=False,
        experts=ExpertsConfig(
            num_moe_experts=4,
            moe_ffn_hidden_size=48,
            moe_shared_expert_intermediate_size=32,
            moe_layer_freq=(0, 1, 1, 0),
        ),
    )
    config = to_hf_config(model, eod_id=2)
    torch.manual_seed(4)
    plain = LadderForCausalLM(config)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.25)
        plain.lm_head.weight[:259] = 0  # no end of the text, no bytes that are no character
    weights = hf_to_megatron(plain.state_dict(), config, model.padded_vocab_size)
    folder = export_folder(weights, config, tokenizer, place / "model", dtype=torch.float32)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextlib.contextmanager
def serving(folder: Path, *options: object) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server's address, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "pretrain.cli", "serve", folder, "--port", port, *options]
    process = subprocess.Popen(
        [str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < end, "it does not start"
            time.sleep(0.2)
        yield address, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(folder, "--max-requests", 2, "--max-waiting", 1, "--max-body-bytes", 20000) as (
        address,
        _,
    ):
        yield address


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """Greedily, by transformers."""
    (text,) = generate_text(folder, [PROMPT], max_new_tokens=32)
    return text[len(PROMPT) :]


def figures(address: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines()]
    return {name: float(value) for name, value in lines if not name.startswith("#")}


def wait_until_idle(address: str) -> None:
    end = time.monotonic() + 20
    while True:
        now = figures(address)
        if (
            now["megatron_ladder_requests_running"] == 0
            and now["megatron_ladder_cache_free_tokens"] == 2 * CONTEXT
        ):
            return
        assert time.monotonic() < end, now
        time.sleep(0.1)


def test_openais_client_completes(client: openai.OpenAI, expected: str) -> None:
    assert [model.id for model in client.models.list()] == ["model"]
    how = {"model": "model", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    whole = client.completions.create(**how)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 32
    pieces = list(
        client.completions.create(**how, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == expected
    assert len(pieces) > 10
    assert pieces[-1].usage == whole.usage

    stop = expected[10:13]
    short = client.completions.create(**how, stop=stop).choices[0]
    assert (short.text, short.finish_reason) == (expected[: expected.index(stop)], "stop")
    echo = client.completions.create(**how, echo=True).choices[0].text
    assert echo == PROMPT + expected
    two = client.completions.create(**{**how, "prompt": [PROMPT, "and then"], "max_tokens": 4})
    assert [choice.index for choice in two.choices] == [0, 1]
    assert expected.startswith(two.choices[0].text)
    hot = client.completions.create(**{**how, "temperature": 1.5}, n=2).choices
    assert hot[0].text != hot[1].text


def test_openais_client_chats(client: openai.OpenAI, folder: Path) -> None:
    prompt = "user: hello\nassistant:"
    (text,) = generate_text(folder, [prompt], max_new_tokens=20)
    how = {"model": "model", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    whole = client.chat.completions.create(**how, max_completion_tokens=20)
    assert whole.choices[0].message.content == text[len(prompt) :]
    assert whole.choices[0].message.role == "assistant"
    pieces = client.chat.completions.create(**how, max_tokens=20, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text[len(prompt) :]
    to_the_end = client.chat.completions.create(**how)
    assert to_the_end.usage.total_tokens == CONTEXT


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"prompt": ""}, 400, "a prompt is empty"),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"prompt": [1, 99999]}, 400, "token id 99999"),
        ({"prompt": [-1]}, 400, "token id -1"),
        ({"prompt": [1 << 80]}, 400, "should be less than 2147483648"),
        ({"stop": list("abcde")}, 400, "at most 4"),
        ({"prompt": "x " * 400}, 400, "exceed the model's context of 512"),
        ({"max_tokens": 600}, 400, "exceed the model's context of 512"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"model": "other"}, 404, "no model 'other'"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_k": -2}, 400, "top_k"),
        ({"n": 17}, 400, "n"),
        ({"n": 4}, 400, "at most 3"),
        ({"logprobs": 3}, 400, "logprobs is not supported"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": "y" * 30000}, 413, "larger than 20,000 bytes"),
    ],
)
def test_bad_requests(address: str, change: dict, status: int, says: str) -> None:
    body = {"model": "model", "prompt": PROMPT, "max_tokens": 4, **change}
    for stream in (False, True):
        response = httpx.post(f"{address}/v1/completions", json={**body, "stream": stream})
        assert response.status_code == status, response.text
        assert says in response.json()["error"]["message"]


def test_bad_bodies(address: str) -> None:
    def post(content: bytes, path: str = "/v1/chat/completions") -> httpx.Response:
        return httpx.post(
            address + path, content=content, headers={"Content-Type": "application/json"}
        )

    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"model": "model"}', b"null"):
        response = post(content)
        assert response.status_code == 400 and response.json()["error"]["message"], content
    empty = {"model": "model", "messages": []}
    assert post(json.dumps(empty).encode()).status_code == 400
    assert post(b"{}", "/v1/nothing").status_code == 404
    assert httpx.get(f"{address}/v1/completions").status_code == 405

    def without_length() -> Iterator[bytes]:
        for _ in range(40):
            yield b"z" * 1000

    assert httpx.post(f"{address}/v1/completions", content=without_length()).status_code == 413


def test_more_than_may_wait_are_refused_and_clients_that_go_leave_nothing(address: str) -> None:
    body = {"model": "model", "prompt": PROMPT, "max_tokens": 480, "temperature": 0}
    three = {**body, "prompt": [PROMPT] * 3, "stream": True}  # two run, one waits
    with httpx.stream("POST", f"{address}/v1/completions", json=three, timeout=60) as stream:
        assert stream.status_code == 200
        refused = httpx.post(f"{address}/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"]
    wait_until_idle(address)  # all three have gone in the middle
    # One that waits for its whole answer goes away as well.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json=body, timeout=0.1)
    wait_until_idle(address)


def test_a_cache_that_is_small_and_a_signal_that_finishes_what_runs(
    folder: Path, expected: str
) -> None:
    with serving(folder, "--cache-tokens", 96) as (address, process):
        assert httpx.get(f"{address}/v1/models/model").json()["max_model_len"] == 96
        body = {"model": "model", "prompt": PROMPT, "max_tokens": 96}
        refused = httpx.post(f"{address}/v1/completions", json=body)
        assert refused.status_code == 400
        assert "exceed the cache of 96 tokens" in refused.json()["error"]["message"]
        chat = {"model": "model", "messages": [{"role": "user", "content": "hello"}]}
        to_the_end = httpx.post(f"{address}/v1/chat/completions", json=chat, timeout=60)
        assert to_the_end.json()["usage"]["total_tokens"] == 96

        body = {
            "model": "model",
            "prompt": PROMPT,
            "max_tokens": 32,
            "temperature": 0,
            "stream": True,
        }
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            events = [first, *filter(None, lines)]
        assert events[-1] == "data: [DONE]"
        pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
        assert process.wait(30) == 0


@pytest.mark.slow
def test_two_ranks_serve_the_same(folder: Path, expected: str) -> None:
    with serving(folder, "--tensor-model-parallel-size", 2) as (address, process):
        body = {"model": "model", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
        response = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        assert response.json()["choices"][0]["text"] == expected
        process.send_signal(signal.SIGTERM)
        process.wait(60)


LAYOUTS = [
    ["--batching", "dynamic"],
    pytest.param(["--batching", "static"], marks=pytest.mark.slow),
    pytest.param(["--tensor-model-parallel-size", "2"], marks=pytest.mark.slow),
    pytest.param(["--pipeline-model-parallel-size", "2"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", LAYOUTS)
def test_a_run_generates_what_its_folder_does(
    folder: Path, expected: str, options: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli.main(["import", str(folder), str(run)]) == 0
    prompts = [PROMPT, "and then"]
    command = [sys.executable, "-m", "pretrain.cli", "generate", str(run), *options]
    command += ["--max-new-tokens", "32", "--prompt", *prompts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n" + "-" * 80 + "\n")
    assert first == PROMPT + expected
    assert second.startswith("and then")


def test_mistakes_are_said_before_anything_starts(folder: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["serve", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["serve", str(folder), "--tensor-model-parallel-size", "3"]) == 2
    assert "is not divisible by" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as used:
        assert cli.main(["serve", str(folder), "--port", str(used.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", str(folder), "--max-requests", "0"])
    assert "--max-requests 0" in capsys.readouterr().err
