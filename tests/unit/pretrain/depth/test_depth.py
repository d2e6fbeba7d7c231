"""`report depth` against the recurrence written out, models with zeroed layers, and maps that are known."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ladder.errors import UserError
from megatron_ladder.hf import LadderForCausalLM
from pretrain import cli
from pretrain.convert.import_model import import_model
from pretrain.depth.conversion import measure_conversion
from pretrain.depth.growth import measure_growth
from pretrain.depth.maps import map_errors, states_after_layers
from pretrain.depth.measures import measure_contributions, measure_skips
from pretrain.depth.report import write_depth_report
from pretrain.depth.states import run
from pretrain.model.staleness import FILE, mean_loss, saved_staleness
from tests.data_sets import write_data_set
from tests.unit.hf import foreign, tiny

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights, but the same ones whatever ran before: now and then a layer hardly matters."""
    torch.manual_seed(0)


def residual_stream(model: LadderForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h before each layer, and what attention and MLP add: [layers, length, hidden], fp64.

    From x_k = x_{k-1} + h_k(norm_k(x_{k-s})), as tests/unit/hf/test_modeling.py, the sub-modules
    taken from the model and everything between them written out here.
    """
    model = model.double()
    weights = dict(model.named_parameters())
    config = model.config
    d = config.head_dim
    angles = torch.outer(
        torch.arange(len(ids)), 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    )
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rope(x: Tensor) -> Tensor:
        pairs = torch.complex(x[:, : d // 2], x[:, d // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=1)

    def attention(x: Tensor, prefix: str) -> Tensor:
        q, k, v = (x @ weights[f"{prefix}.{n}_proj.weight"].T for n in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            shared = head // (config.num_attention_heads // config.num_key_value_heads) * d
            scores = (
                rope(q[:, head * d : head * d + d]) @ rope(k[:, shared : shared + d]).T / d**0.5
            )
            future = torch.ones_like(scores).triu(1).bool()
            weighted = scores.masked_fill(future, float("-inf")).softmax(-1)
            heads.append(weighted @ v[:, shared : shared + d])
        return torch.cat(heads, dim=1) @ weights[f"{prefix}.o_proj.weight"].T

    def mlp(x: Tensor, prefix: str) -> Tensor:
        gate, up = (x @ weights[f"{prefix}.{n}_proj.weight"].T for n in ("gate", "up"))
        return (gate * gate.sigmoid() * up) @ weights[f"{prefix}.down_proj.weight"].T

    def scaled(output: Tensor, layer: int, which: int) -> Tensor:
        if config.residual_scaling == "skipinit":
            return output * weights[f"model.layers.{layer}.residual_scales"][which]
        power = {"none": 0, "1/n": -1, "1/sqrt-n": -0.5}[config.residual_scaling]
        return output * (2 * config.num_hidden_layers) ** power

    ladder = config.ladder_layer_indices()
    x = [weights["model.embed_tokens.weight"][ids]]
    before, attentions, mlps = [], [], []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        before.append(x[-1])
        read = x[-2] if layer in ladder and layer > 0 else x[-1]
        normed = norm(read, f"{prefix}.input_layernorm.weight")
        attentions.append(scaled(attention(normed, f"{prefix}.self_attn"), layer, 0))
        if "parallel" in config.residual:
            mlps.append(scaled(mlp(normed, f"{prefix}.mlp"), layer, -1))
            x.append(x[-1] + attentions[-1] + mlps[-1])
            continue
        x.append(x[-1] + attentions[-1])
        read = x[-2] if layer in ladder else x[-1]
        normed = norm(read, f"{prefix}.post_attention_layernorm.weight")
        mlps.append(scaled(mlp(normed, f"{prefix}.mlp"), layer, -1))
        x.append(x[-1] + mlps[-1])
    return torch.stack(before), torch.stack(attentions), torch.stack(mlps)


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_contributions_are_those_of_the_recurrence(kind: str) -> None:
    model = tiny.model(**tiny.KINDS[kind])
    sequences = tiny.tokens(3, 11)
    found = measure_contributions(model, sequences)
    totals = torch.zeros(6, tiny.LAYERS, dtype=torch.float64)
    for ids in sequences:
        h, a, m = residual_stream(model, ids[:-1])
        to = h if "parallel" in kind else h + a
        for row, (added, base) in enumerate(((a, h), (m, to), (a + m, h))):
            sizes = [x.pow(2).sum(-1).sqrt() for x in (added, base)]
            totals[row] += (sizes[0] / sizes[1]).sum(1)
            totals[row + 3] += ((added * base).sum(-1) / sizes[0] / sizes[1]).sum(1)
    names = ("attention", "mlp", "layer")
    measured = [getattr(found, n) for n in (*names, *(f"{n}_cosine" for n in names))]
    torch.testing.assert_close(
        torch.tensor(measured, dtype=torch.float64), totals / 30, atol=1e-4, rtol=1e-4
    )
    if kind == "ladder":  # added to, not read: the two differ
        h, a, m = residual_stream(model, sequences[0, :-1])
        assert (
            F.cosine_similarity(m, h, dim=-1) - F.cosine_similarity(m, h + a, dim=-1)
        ).std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard", "ladder by skipinit", "parallel by 1/sqrt-n"])
def test_growth_is_that_of_the_recurrence(kind: str) -> None:
    model = tiny.model(**(tiny.KINDS | tiny.SCALED)[kind])
    ids = tiny.tokens(1, 11)
    found = measure_growth(model, ids)
    h, a, m = residual_stream(model, ids[0, :-1])
    added = [a + m] if "parallel" in kind else [a, m]
    logs = torch.zeros(3, tiny.LAYERS, dtype=torch.float64)
    for layer in range(tiny.LAYERS):
        stream = h[layer]
        for output in added:
            c = output[layer].norm(dim=-1) / stream.norm(dim=-1)
            logs[1, layer:] += (1 + c**2).sqrt().log().mean()
            logs[2, layer:] += (1 + c).log().mean()
            stream = stream + output[layer]
        logs[0, layer] = (stream.norm(dim=-1) / h[0].norm(dim=-1)).log().mean()
    measured = torch.tensor([found.measured, found.independent, found.aligned]).log()
    torch.testing.assert_close(measured.double(), logs, atol=1e-4, rtol=1e-4)
    assert (measured[0] - measured[1]).abs().max() > 0.01  # outputs are not at right angles
    assert (measured[2] > measured[:2]).all()


def without(model: LadderForCausalLM, layer: int) -> LadderForCausalLM:
    """The model with a layer that adds nothing."""
    zeroed = LadderForCausalLM(model.config).eval()
    zeroed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for module in (
            zeroed.model.layers[layer].self_attn.o_proj,
            zeroed.model.layers[layer].mlp.down_proj,
        ):
            module.weight.zero_()
    return zeroed


@torch.no_grad()
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_skipped_layer_is_one_whose_last_matrices_are_zero(kind: str) -> None:
    model = tiny.model(**tiny.KINDS[kind])
    sequences = tiny.tokens(2, 13)
    found, _ = measure_skips(model, sequences)
    for skip in range(tiny.LAYERS):
        zeroed = without(model, skip)
        changes, distances = [], []
        for ids in sequences[:, :-1]:
            layers = []
            for one in (model, zeroed):
                states = one(ids[None], use_cache=False, output_hidden_states=True).hidden_states
                last = run(one, ids).states[-1]  # transformers' own is normed
                layers.append(torch.stack([*(s[0] for s in states[:-1]), last]).diff(dim=0))
            changes.append((layers[0] - layers[1]).norm(dim=-1) / layers[0].norm(dim=-1))
            outputs = [one(ids[None]).logits[0].softmax(-1) for one in (model, zeroed)]
            distances.append((outputs[0] - outputs[1]).norm(dim=-1))
        changes, distances = torch.cat(changes, dim=1), torch.cat(distances)
        for later in range(tiny.LAYERS):
            largest, mean = found.later_max[skip][later], found.later_mean[skip][later]
            if later <= skip:
                assert largest is mean is None
            else:
                # abs: the next layer does not read what a layer adds, if it is a parallel-ladder one
                assert largest == pytest.approx(changes[later].max().item(), rel=1e-3, abs=1e-6)
                assert mean == pytest.approx(changes[later].mean().item(), rel=1e-3, abs=1e-6)
        assert found.output_max[skip] == pytest.approx(distances.max().item(), rel=1e-3)
        assert found.output_mean[skip] == pytest.approx(distances.mean().item(), rel=1e-3)
        increase = mean_loss(zeroed, sequences) - mean_loss(model, sequences)
        assert found.loss_increase[skip] == pytest.approx(increase, abs=1e-4)
        assert abs(increase) > 1e-3


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_layer_skipped_at_some_positions(kind: str) -> None:
    model = tiny.model(**tiny.KINDS[kind])
    ids = tiny.tokens(1, 12)[0]
    whole = run(model, ids)
    for skip in range(tiny.LAYERS):
        # Before and after, nothing changes that cannot have seen it.
        later = run(model, ids, skip, slice(5, None))
        torch.testing.assert_close(later.logits[:5], whole.logits[:5], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(later.states[: skip + 1], whole.states[: skip + 1])
        assert (later.states[skip + 1, 5:] == later.states[skip, 5:]).all()
        assert (later.logits[5:] - whole.logits[5:]).abs().amin(0).max() > 1e-3
        # At positions up to t: they are as with the layer skipped everywhere.
        earlier, everywhere = run(model, ids, skip, slice(0, 5)), run(model, ids, skip)
        torch.testing.assert_close(earlier.logits[:5], everywhere.logits[:5], atol=1e-5, rtol=1e-5)
        changed = (earlier.logits[5:] - whole.logits[5:]).abs().max()
        # Other positions read a layer's output in a later layer's attention, if one reads it at all.
        last_read = tiny.LAYERS - (3 if model.model.layers[-1].residual == "parallel-ladder" else 2)
        assert changed > 1e-3 if skip <= last_read else changed < 1e-5
    again = run(model, ids)
    assert torch.equal(again.logits, whole.logits)


def test_later_positions_are_the_second_half() -> None:
    model = tiny.model(residual="ladder")
    sequences = tiny.tokens(3, 10)  # 9 are read: 0 to 3 skipped, 4 to 8 measured
    _, found = measure_skips(model, sequences)
    for skip in range(tiny.LAYERS):
        increase, changes = 0.0, []
        for ids in sequences:
            whole, part = run(model, ids[:-1]), run(model, ids[:-1], skip, slice(0, 4))
            losses = [
                F.cross_entropy(p.logits[4:], ids[5:], reduction="sum").item()
                for p in (part, whole)
            ]
            increase += losses[0] - losses[1]
            change = (whole.layer - part.layer)[:, 4:].norm(dim=-1) / whole.layer[:, 4:].norm(
                dim=-1
            )
            changes.append(change.amax(1))
        assert found.loss_increase[skip] == pytest.approx(increase / 15, abs=1e-5)
        for later in range(skip + 1, tiny.LAYERS):
            largest = torch.stack(changes)[:, later].max().item()
            assert found.later_max[skip][later] == pytest.approx(largest, rel=1e-4)
    assert found.output_max[-1] == pytest.approx(0, abs=1e-6)  # read by its own position alone


def test_a_model_maps_onto_itself_and_onto_a_rotated_copy() -> None:
    model = tiny.model(residual="ladder")
    states = states_after_layers(model, tiny.tokens(8, 33))
    assert states.shape == (tiny.LAYERS, 8, 32, 32)
    errors = torch.tensor(map_errors(states, states))
    assert errors.diagonal().max() < 1e-3
    assert errors[~torch.eye(tiny.LAYERS, dtype=torch.bool)].min() > 0.05
    turn = torch.linalg.qr(torch.randn(32, 32))[0]
    rotated = states.flip(0) @ turn  # and in the other order
    errors = torch.tensor(map_errors(states, rotated))
    assert errors.flip(1).diagonal().max() < 1e-3
    # Measured on what the map was not fitted on: noise is not a map of noise.
    noise = torch.tensor(map_errors(states, torch.randn(2, 8, 32, 64)))
    assert noise.shape == (tiny.LAYERS, 2)
    assert noise.min() > 0.9


@pytest.mark.parametrize(
    ("fresh", "stale"), [("standard", "ladder"), ("parallel", "parallel-ladder")]
)
def test_conversions(fresh: str, stale: str) -> None:
    sequences = tiny.tokens(3, 13)
    standard = tiny.model(residual=fresh)
    found = measure_conversion(standard, sequences, "tests")
    assert found.staleness is not None
    assert (found.to, sorted(found.alone), found.back) == (stale, [0, 1, 2, 3], False)
    assert [rule.count for rule in found.rules] == [1, 2, 3]
    for rule in found.rules:
        for layers, loss in ((rule.chosen, rule.chosen_loss), (rule.count, rule.last_loss)):
            given = list(layers) if isinstance(layers, tuple) else layers
            ladder = tiny.model(residual=stale, ladder_layers=given)
            ladder.load_state_dict(standard.state_dict())
            assert loss == pytest.approx(mean_loss(ladder, sequences), abs=1e-5)
        assert rule.chosen == found.staleness.choose(rule.count)

    hybrid = tiny.model(residual=stale, ladder_layers=[0, 2])
    found = measure_conversion(hybrid, sequences, "tests")
    assert (found.to, found.back, found.rules, found.staleness) == (fresh, True, [], None)
    for changed, left in ((0, [2]), (2, [0])):
        other = tiny.model(residual=stale, ladder_layers=left)
        other.load_state_dict(hybrid.state_dict())
        assert found.alone[changed] == pytest.approx(mean_loss(other, sequences), abs=1e-5)
    assert sorted(found.alone) == [0, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A published standard model, imports of it as it is and with ladder layers, and data."""
    path = tmp_path_factory.mktemp("depth")
    published = foreign.save(foreign.make("llama, all heads"), path / "published")
    import_model(published, path / "run")
    import_model(published, path / "ladder", "last:2")
    tokenizer = next(published.glob("tokenizer.*")).read_bytes()
    data = write_data_set(path / "data", vocab_size=foreign.VOCAB, tokenizer=tokenizer)
    return {"published": published, "run": path / "run", "ladder": path / "ladder", "data": data}


def test_one_model(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    argv = [str(folders["run"]), "--data", str(folders["data"]), "--sequences", "2"]
    assert cli.main(["report", "depth", *argv, "--seq-length", "12"]) == 0
    output = folders["run"] / "depth"
    names = {"contributions", "growth", "skip_effects", "skip_outputs", "staleness", "rules"}
    assert {path.stem for path in output.glob("*.png")} == names
    assert all(path.read_bytes().startswith(PNG) for path in output.glob("*.png"))
    html = (output / "index.html").read_text()
    assert html.count("data:image/png;base64,") == len(names)
    assert "http" not in html.replace("https://arxiv", "")  # nothing is fetched
    facts = json.loads((output / "depth.json").read_text())
    (model,) = facts["models"]
    assert facts["maps"] is None
    assert "validation: 2 sequences of 12 tokens" in facts["data"]
    staleness = saved_staleness(folders["run"])
    assert staleness.tokens == 24
    assert staleness.standard == model["loss"]
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    for layer in range(4):
        made_ladder = f"{staleness.alone[layer] - model['loss']:+.4f}"
        share = f"{model['contributions']['mlp'][layer]:.3f}"
        (row,) = [r for r in rows if r[:2] == [str(layer), "standard"]]
        assert (row[3], row[-1]) == (share, made_ladder)
        assert f"<td>{share}</td>" in html
    assert f"Report: {output / 'index.html'}" in printed


def test_two_models(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    page = write_depth_report(
        [folders["published"], folders["ladder"]], folders["data"], out, count=4, length=30
    )
    html = page.read_text()
    assert (out / "maps.png").read_bytes().startswith(PNG)
    facts = json.loads((out / "depth.json").read_text())
    errors = torch.tensor(facts["maps"]["errors"])
    assert errors.shape == (4, 4)
    # The first two layers are the same in both; their states are mapped as they are.
    assert errors.diagonal()[:2].max() < 1e-2
    assert "Few tokens" in html
    assert "has ladder layers" in html
    assert [model["residual"] for model in facts["models"]] == [
        ["standard"] * 4,
        ["standard", "standard", "ladder", "ladder"],
    ]
    # Of a published folder beside the page; a model with ladder layers has none.
    assert saved_staleness(out).standard == facts["models"][0]["loss"]
    assert not (folders["ladder"] / FILE).exists()
    assert not (folders["published"] / "depth").exists()


@pytest.mark.parametrize("kind", ["parallel", "parallel-ladder 0 and 2"])
def test_parallel_models_and_names(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    parallel = tiny.model(**tiny.KINDS[kind], vocab_size=foreign.VOCAB)
    folder = tmp_path / "<b>parallel"
    parallel.save_pretrained(folder)
    tokenizer = next(folders["published"].glob("tokenizer.*"))
    (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    html = write_depth_report([folder], folders["data"], count=1, length=8).read_text()
    changed = "with one layer made a parallel-ladder layer"
    if kind != "parallel":
        changed = "with one of them made\n<em>parallel</em>"
    assert changed in html
    assert "<b>parallel" not in html
    pictures = {path.stem for path in (folder / "depth").glob("*.png")}
    assert ("rules" in pictures, "staleness" in pictures) == (kind == "parallel", True)
    assert len(list(folder.rglob(FILE))) == (kind == "parallel")


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    other_data = write_data_set(tmp_path / "other", tokenizer=b"another")
    stranger = foreign.save(foreign.make("llama, all heads"), tmp_path / "stranger")
    tokenizer = next(stranger.glob("tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text() + "\n")
    run_, data = str(folders["run"]), ("--data", str(folders["data"]))
    out = tmp_path / "out"
    for argv, message in {
        ("nowhere", *data): "nowhere does not exist",
        (run_,): "it has none of its own",
        (run_, "--data", str(tmp_path)): "holds no manifest.json",
        (run_, "--data", str(other_data)): "another tokenizer",
        (run_, str(stranger), *data): "different tokenizers",
        (run_, *data, "--seq-length", "65"): "longer than max_position_embeddings 64",
        (run_, *data, "--seq-length", "1"): "at least 2",
        (run_, *data, "--sequences", "0"): "at least 1",
        (run_, run_, *data, "--sequences", "1"): "raise --sequences",
    }.items():
        assert cli.main(["report", "depth", *argv, "--output-dir", str(out)]) == 2, argv
        assert message in " ".join(capsys.readouterr().err.split()), argv
        assert not out.exists(), argv
    long = foreign.save(foreign.make("llama, untied, llama3"), tmp_path / "long")
    with pytest.raises(UserError, match="768 tokens, a sequence takes 1,001"):
        write_depth_report([long], folders["data"], out, length=1000)


def test_a_run_named_depth_is_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("depth").mkdir()
    assert cli.main(["report", "./depth"]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_a_runs_own_data_is_the_default(folders: dict[str, Path], tmp_path: Path) -> None:
    config = folders["run"] / "config.json"
    before = config.read_text()
    facts = json.loads(before)
    try:
        facts["data"]["paths"] = [str(folders["data"])]
        config.write_text(json.dumps(facts))
        write_depth_report([folders["run"]], output_dir=tmp_path, count=1, length=8)
        assert str(folders["data"]) in json.loads((tmp_path / "depth.json").read_text())["data"]
        facts["data"]["paths"] = [str(tmp_path / "gone")]
        config.write_text(json.dumps(facts))
        with pytest.raises(UserError, match="gone, is not there"):
            write_depth_report([folders["run"]], count=1, length=8)
    finally:
        config.write_text(before)
