"""`data verify` finds any byte that changed, and says where."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.dataset import verify
from data_prep.errors import UserError
from data_prep.parts import plan


@pytest.fixture(scope="module")
def whole(jsonl: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of several parts."""
    folder = tmp_path_factory.mktemp("verify") / "data"
    argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SMALLEST_BYTES", 3000)
        assert cli.main([str(a) for a in argv] + ["--validation-fraction", "0.2"]) == 0
    assert len(json.loads((folder / "manifest.json").read_text())["splits"]["train"]["parts"]) > 3
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def check(folder: Path) -> str:
    return verify.verify(verify.Verify(folder, workers=2))


def change_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def without_checksums(folder: Path) -> None:
    def change(manifest: dict) -> None:
        for split in manifest["splits"].values():
            del split["parts"], split["idx_sha256"]

    change_manifest(folder, change)


def edit_tokens(folder: Path, place: int, value: int) -> None:
    tokens = np.memmap(folder / "train.bin", "<u2", "r+")
    tokens[place] = value
    tokens.flush()


def test_a_whole_data_set_is_ok(whole: Path, capsys) -> None:
    assert cli.main(["verify", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("OK: 200 documents")
    assert "MB/s" in printed


def test_chunks_do_not_matter(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = check(whole).split(" in ")[0]
    monkeypatch.setattr(verify, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(verify, "DOCUMENTS_AT_ONCE", 3)
    assert check(whole).split(" in ")[0] == summary


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_changed_byte_is_found(data: Path, draw) -> None:
    name = draw.draw(
        st.sampled_from(["train.bin", "train.idx", "validation.bin", "tokenizer.model"])
    )
    raw = (data / name).read_bytes()
    place = draw.draw(st.integers(0, len(raw) - 1))
    flip = draw.draw(st.integers(1, 255))
    (data / name).write_bytes(raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :])
    with pytest.raises(UserError, match=name):
        check(data)
    (data / name).write_bytes(raw)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_changed_byte_of_the_index_is_found_without_checksums(data: Path, draw) -> None:
    without_checksums(data) if "idx_sha256" in (data / "manifest.json").read_text() else None
    raw = (data / "train.idx").read_bytes()
    place = draw.draw(st.integers(0, len(raw) - 1))
    (data / "train.idx").write_bytes(
        raw[:place] + bytes([raw[place] ^ draw.draw(st.integers(1, 255))]) + raw[place + 1 :]
    )
    with pytest.raises(UserError, match=r"train\.(idx|bin)"):
        check(data)
    (data / "train.idx").write_bytes(raw)


def test_what_is_wrong_is_said_with_its_place(data: Path) -> None:
    without_checksums(data)
    assert "no checksums" in check(data)
    lengths = np.fromfile(data / "train.idx", "<i4", 5, offset=34)
    end = int(lengths[:3].sum()) - 1
    eod = json.loads((data / "manifest.json").read_text())["tokenizer"]["eod_id"]
    edit_tokens(data, end, 5)
    with pytest.raises(
        UserError, match=rf"document 2 does not end with EOD {eod} \(byte {2 * end},?"
    ):
        check(data)
    edit_tokens(data, end, eod)
    edit_tokens(data, 4, 340)
    with pytest.raises(UserError, match="token id 340 at byte 8 is not below the vocabulary's 340"):
        check(data)
    edit_tokens(data, 4, eod)
    assert "1 EOD ids are inside documents" in check(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["splits"]["train"].update(documents=7), "take 182 bytes of index"),
        (lambda m: m["splits"]["train"].update(tokens=7), "the manifest says 7"),
        (lambda m: m["splits"]["train"]["parts"].pop(), "do not add up"),
        (lambda m: m["tokenizer"].update(eod_id=340), "eod_id is 340: it must be an id below 340"),
        (lambda m: m["tokenizer"].update(sha256="0" * 64), "sha256 differs"),
        (lambda m: m.update(dtype="int32"), "not the index of int32"),
    ],
)
def test_a_manifest_of_another_data_set(data: Path, change, said: str) -> None:
    change_manifest(data, change)
    with pytest.raises(UserError, match=said):
        check(data)


def test_missing_and_short_files(data: Path, refused) -> None:
    (data / "validation.idx").unlink()
    with (data / "train.bin").open("ab") as file:
        file.write(b"xx")
    said = refused("verify", data)
    assert "validation.idx is missing" in said
    assert "train.bin has" in said
    (data / "manifest.json").write_text("{}")
    assert "not a data set's manifest" in refused("verify", data)
    (data / "manifest.json").unlink()
    assert "holds no manifest.json" in refused("verify", data)


def test_masks(tokenizer: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"q": f"q {i}", "a": f"a {i}"}) + "\n" for i in range(20)))
    folder = tmp_path / "pairs"
    argv = [
        "tokenize",
        pairs,
        "--tokenizer",
        tokenizer,
        "--output-dir",
        folder,
        "--text-field",
        "q",
    ]
    argv += ["--answer-field", "a", "--validation-fraction", "0"]
    assert cli.main([str(a) for a in argv]) == 0
    assert check(folder).startswith("OK")
    mask = bytearray((folder / "train.mask").read_bytes())
    mask[3] ^= 1
    (folder / "train.mask").write_bytes(mask)
    with pytest.raises(UserError, match=r"train\.mask: bytes 0 to .* another sha256"):
        check(folder)
    mask[3] = 9
    (folder / "train.mask").write_bytes(mask)
    with pytest.raises(UserError, match=r"train\.mask: byte 3 is neither 0 nor 1"):
        check(folder)


def test_a_masked_data_set_of_which_the_manifest_says_too_little(
    tokenizer: Path, tmp_path: Path
) -> None:
    pairs, folder = tmp_path / "pairs.jsonl", tmp_path / "pairs"
    pairs.write_text("".join(json.dumps({"q": f"q {i}", "a": f"a {i}"}) + "\n" for i in range(20)))
    argv = ["tokenize", pairs, "--tokenizer", tokenizer, "--output-dir", folder]
    argv += ["--text-field", "q", "--answer-field", "a", "--validation-fraction", "0"]
    assert cli.main([str(a) for a in argv]) == 0
    assert "no checksums" not in check(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for lacking in ("mask_sha256", "parts"):
        train = manifest["splits"]["train"]
        (train["parts"][0] if lacking == "mask_sha256" else train).pop(lacking)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert "The manifest has no checksums: the contents fit the format" in check(folder)
    mask = bytearray((folder / "train.mask").read_bytes())
    mask[3] ^= 1
    (folder / "train.mask").write_bytes(mask)
    with pytest.raises(UserError, match=r"tokens to train on, the manifest says"):
        check(folder)
    del train["trained_tokens"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"tokens to train on, the manifest says nothing"):
        check(folder)


def test_a_data_set_whose_mask_is_gone_is_not_done(
    tokenizer: Path, tmp_path: Path, refused
) -> None:
    pairs, folder = tmp_path / "pairs.jsonl", tmp_path / "pairs"
    pairs.write_text("".join(json.dumps({"q": f"q {i}", "a": f"a {i}"}) + "\n" for i in range(20)))
    argv = ["tokenize", pairs, "--tokenizer", tokenizer, "--output-dir", folder]
    argv += ["--text-field", "q", "--answer-field", "a", "--validation-fraction", "0"]
    assert cli.main([str(a) for a in argv]) == 0
    assert cli.main([str(a) for a in argv]) == 0
    (folder / "train.mask").unlink()
    assert "is not empty and holds something else" in refused(*argv)
