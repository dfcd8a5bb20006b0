"""Every bad input to the conversions: one line that names it, exit code 2, and nothing written."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from tests.checkpoints import read_checkpoint
from tests.llamas import SHAPE, llama, to_dcp, to_llama, write_meta_layout
from tests.processes import run
from tests.test_reader import Payload
from torchtitan.convert.arguments import parse_dcp_to_llama

Change = Callable[[Path], Any]


def fails(script: str, *arguments: str, status: int = 2, **environment: str) -> str:
    """Runs a script, which has to fail with this status and one line; returns it."""
    done = run([sys.executable, script, *arguments], **environment)
    assert done.returncode == status, done.stdout
    assert "Traceback" not in done.stdout
    message = done.stdout[done.stdout.index("error:") :].strip()
    assert "\n" not in message
    return message


def edit(name: str, **changes: Any) -> Change:
    """Changes keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        settings = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))

    return change


def edit_weights(file: str, **changes: Any) -> Change:
    """Changes entries of a .pth; None removes one."""

    def change(folder: Path) -> None:
        weights = {**torch.load(folder / file), **{key.replace("__", "."): value for key, value in changes.items()}}
        torch.save({name: weight for name, weight in weights.items() if weight is not None}, folder / file)

    return change


def truncate(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-300])


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def copy(name: str, new: str) -> Change:
    return lambda folder: (folder / new).write_bytes((folder / name).read_bytes())


def plant(name: str) -> Change:
    return lambda folder: torch.save({"a": Payload(folder.parent / "it ran")}, folder / name)


def other_model(name: str) -> Change:
    """Puts the shard of a model of the same shape and other weights in the place of one."""

    def change(folder: Path) -> None:
        other = write_meta_layout(folder.parent / "other", llama(SHAPE, seed=1), shards=2)
        (other / name).rename(folder / name)

    return change


FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"
META: list[tuple[Change, str]] = [
    (lambda folder: [path.unlink() for path in folder.iterdir()], "the folder is empty"),
    (lambda folder: [remove(name)(folder) for name in (FIRST, SECOND)], f"has no {FIRST}"),
    (remove("params.json"), "has no params.json"),
    (edit("params.json", dim=None), "lacks the key dim"),
    (edit("params.json", norm_eps=None), "lacks the key norm_eps"),
    (edit("params.json", rope_theta=None), "lacks the key rope_theta"),
    (edit("params.json", multiple_of=None), "lacks the key multiple_of"),
    (edit("params.json", use_scaled_rope=None), "lacks the key use_scaled_rope, and weights are wrong with another"),
    (edit("params.json", dim=-1), "dim = -1: not a positive int"),
    (edit("params.json", n_layers="2"), 'n_layers = "2": not a positive int'),
    (edit("params.json", vocab_size=True), "vocab_size = true: not a positive int"),
    (edit("params.json", n_heads=7), "7 heads do not divide a width of 128"),
    (edit("params.json", n_kv_heads=5), "5 key and value heads do not divide 16 heads"),
    (edit("params.json", n_kv_heads=1), "n_kv_heads = 1 cannot be spread over the 2 shards"),
    (edit("params.json", n_layers=3), "does not hold the 3 layers of params.json: it has 2, without 2"),
    (edit("params.json", n_layers=1), "does not hold the 1 layers of params.json: it has 2"),
    (edit("params.json", vocab_size=100), "tok_embeddings.weight is [96, 128] there and [100, 128] by params.json"),
    (edit("params.json", ffn_dim_multiplier=1.3), "w1.weight is [192, 128] there and [448, 128] by params.json"),
    (edit("params.json", use_scaled_rope=True, rope_scaling_factor=32), "rope_scaling_factor = 32: only Llama 3.1's"),
    (lambda folder: (folder / "params.json").write_text("{"), "params.json cannot be read"),
    (lambda folder: (folder / "params.json").write_text("[]"), "params.json is not a JSON object"),
    (remove(SECOND), "1 shards hold 64 of the 128 rows of wq that params.json tells of: shards are missing"),
    (copy(FIRST, "consolidated.03.pth"), "lacks consolidated.02.pth, but has consolidated.03.pth"),
    (copy(FIRST, "optimizer.pth"), "holds .pth files that are no part of a model in Meta's format: optimizer.pth"),
    (copy(FIRST, "model.safetensors"), "holds both .pth and safetensors files"),
    (truncate(SECOND), "is truncated, or not a file of torch.save"),
    (lambda folder: (folder / SECOND).write_bytes(b"PK"), "is truncated, or not a file of torch.save"),
    (plant(SECOND), "it names posix.mkdir, for which weights have no use; nothing of it was run"),
    (other_model(SECOND), "are shards of different models: layers.0.attention_norm.weight is not the same"),
    (edit_weights(SECOND, extra=torch.ones(1)), "are shards of different models: other names"),
    (edit_weights(SECOND, norm__weight=torch.ones(128).bfloat16()), "shards of different models: norm.weight is"),
    (edit_weights(FIRST, norm__weight=[1, 2]), "is not a dictionary of tensors"),
    (lambda folder: torch.save(torch.ones(3), folder / FIRST), "is not a dictionary of tensors"),
]


@pytest.mark.parametrize(("change", "message"), META, ids=[message[:40] for _, message in META])
def test_metas_format(tmp_path: Path, change: Change, message: str) -> None:
    source = write_meta_layout(tmp_path / "source", llama(SHAPE), shards=2)
    change(source)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        to_dcp(source, tmp_path / "out", "--keep_embeddings")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("source", "other")]


INDEX = "model.safetensors.index.json"
HF_FIRST = "model-00001-of-00004.safetensors"
HF: list[tuple[Change, str]] = [
    (remove("config.json"), "has no config.json"),
    (edit("config.json", hidden_size=None), "lacks the key hidden_size"),
    (edit("config.json", rope_parameters=None), "lacks the key rope_theta"),
    (edit("config.json", model_type="mistral"), 'model_type = "mistral": only llama can be converted'),
    (edit("config.json", quantization_config={}), "only weights that are not quantised"),
    (edit("config.json", attention_bias=True), "attention_bias = true: only false can be converted"),
    (edit("config.json", hidden_act="gelu"), 'hidden_act = "gelu": only "silu"'),
    (edit("config.json", head_dim=16), "head_dim = 16: only 8"),
    (edit("config.json", num_hidden_layers=5), "does not hold the 5 layers of config.json: it has 2, without 2, 3, 4"),
    (edit("config.json", intermediate_size=100), "is [192, 128] there and [100, 128] by config.json"),
    (
        edit("config.json", rope_parameters={"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5}),
        "rope scaling with factor = 32.0, low_freq_factor = None",
    ),
    (
        edit("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 5e5}),
        "rope scaling with rope_type = yarn",
    ),
    (remove(INDEX), f"holds several files of a model, but not their {INDEX}"),
    (edit(INDEX, weight_map=None), "has no weight_map"),
    (remove(HF_FIRST), f"lacks {HF_FIRST}"),
    (copy(HF_FIRST, "other.safetensors"), "safetensors that are no part of the model: other.safetensors"),
    (copy("model-00002-of-00004.safetensors", HF_FIRST), f"{HF_FIRST} does not hold what {INDEX} says"),
    (truncate(HF_FIRST), f"{HF_FIRST} is damaged"),
    (lambda folder: (folder / HF_FIRST).write_bytes(b"nonsense"), f"{HF_FIRST} is damaged"),
]


@pytest.mark.parametrize(("change", "message"), HF, ids=[message[:40] for _, message in HF])
def test_hugging_faces_format(tmp_path: Path, change: Change, message: str) -> None:
    source = tmp_path / "source"
    llama(SHAPE).save_pretrained(source, max_shard_size="300KB")
    change(source)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        to_dcp(source, tmp_path / "out", "--keep_embeddings")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_floats(tmp_path: Path) -> None:
    source = write_meta_layout(tmp_path / "source", llama(SHAPE))
    edit_weights(FIRST, norm__weight=torch.ones(128, dtype=torch.int8))(source)
    with pytest.raises(ValueError, match=r"norm\.weight is torch\.int8; weights are float32"):
        to_dcp(source, tmp_path / "out")
    folder = tmp_path / "hf"
    model = llama(SHAPE)
    nn.Module.to(model, torch.float64)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"is F64; weights are F32, BF16, F16"):
        to_dcp(folder, tmp_path / "out")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return to_dcp(write_meta_layout(tmp_path / "source", llama(SHAPE)), tmp_path / "dcp", "--keep_embeddings")


def test_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    """What is wrong with a DCP checkpoint, here one of a file a tensor, or with what it says of itself."""
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    state, checkpoint = read_checkpoint(checkpoint), tmp_path / "checkpoint"
    dcp.save(state, storage_writer=FileSystemWriter(checkpoint, single_file_per_rank=False), no_dist=True)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            to_llama(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def recorded(**model: Any) -> None:
        (checkpoint / "checkpoint.json").write_text(json.dumps({"format": 1, "model": model}))

    recorded(**{**record["model"], "n_layers": 3})
    refused(r"does not hold the 3 layers of checkpoint\.json: it has 2, without 2")
    recorded(**record["model"], heads=3)
    refused(r"checkpoint\.json: not the shape of a model: .*'heads'")
    recorded(**record["model"])
    damaged = bytearray((checkpoint / "__0_3.distcp").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    whole = (checkpoint / "__0_3.distcp").read_bytes()
    (checkpoint / "__0_3.distcp").write_bytes(damaged)
    refused("__0_3.distcp is damaged: archive/data/0 does not have its checksum")
    (checkpoint / "__0_3.distcp").write_bytes(whole[:-5])
    refused("__0_3.distcp is truncated")
    plant("__0_3.distcp")(checkpoint)
    refused(r"it names posix\.mkdir, .*nothing of it was run")
    remove("__0_3.distcp")(checkpoint)
    refused("__0_3.distcp cannot be read: No such file")
    assert not (tmp_path / "it ran").exists()


def test_as_commands(checkpoint: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    message = fails("llama_to_dcp.py", "--input_dir", str(tmp_path / "absent"), "--output_dir", out)
    assert f'--input_dir = "{tmp_path / "absent"}": no such folder' in message
    remove("checkpoint.json")(checkpoint)
    (checkpoint / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch it-ran'\ntR.")
    message = fails("dcp_to_llama.py", "--input_dir", str(checkpoint), "--output_dir", out)
    assert "it names posix.system" in message
    assert not Path(out).exists()


def test_places(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(ValueError, match="dcp is not empty; take another --output_dir, or replace it with --overwrite"):
        to_dcp(source, checkpoint)
    with pytest.raises(ValueError, match=r'--input_dir = ".*source": holds neither a DCP checkpoint nor steps of one'):
        to_llama(source, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; --output_dir names a folder to be made"):
        to_dcp(source, tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds neither Meta's consolidated\.00\.pth nor Hugging Face's"):
        to_dcp(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--push_to_hub",), "--push_to_hub needs --hf_repo_name"),
        (("--public",), "--public has no meaning without --push_to_hub"),
        (("--max_shard_size", "1GB"), "--max_shard_size has no meaning without --format hf"),
        (("--format", "hf", "--max_shard_size", "0"), "'0' is not a size like 5GB"),
        (("--format", "hf", "--max_shard_size", "5 parsecs"), "'5 parsecs' is not a size"),
        (("--format", "onnx"), "invalid choice: 'onnx'"),
        (("--flavor", "9B"), "invalid choice: '9B'"),
        (("--fromat", "hf"), "--fromat: unknown flag; did you mean --format?"),
    ],
)
def test_command_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_dcp_to_llama(["--input_dir", "in", "--output_dir", "out", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a b", "--hf_repo_name a b: "),
        ("a/b/c", "--hf_repo_name a/b/c: "),
        ("a--b", "--hf_repo_name a--b: "),
        ("a/b", "--push_to_hub without a login: set HF_TOKEN, or log in"),
    ],
)
def test_hub(checkpoint: Path, tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_llama(checkpoint, tmp_path / "out", "--push_to_hub", "--hf_repo_name", name)
    assert not (tmp_path / "out").exists()


def test_disk_too_small(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    needed = 2**20 + 4 * replace(SHAPE).num_params
    with pytest.raises(ValueError, match=f"no room for the output: {needed:,} bytes needed, 1,000 free"):
        to_llama(checkpoint, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
