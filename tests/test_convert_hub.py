"""Pushing to a Hub that runs on this machine, with the commands as a user gives them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import saved
from tests.hub_server import TOKEN, Hub, running_hub
from tests.llamas import MODEL_FLAGS, SHAPE, llama, loaded, logits, to_dcp, to_llama, write_meta_layout
from tests.models import small_model, train_a_little
from tests.processes import free_port, run
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.convert.card import model_card
from torchtitan.distributed.world import World

# As the script, but what waits before it tries again does not wait long.
SCRIPT = """
import runpy, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
runpy.run_path("dcp_to_llama.py", run_name="__main__")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Converted from weights with a licence."""
    source = write_meta_layout(tmp_path / "Llama-3.1-8B", llama(SHAPE))
    (source / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nand so on\n")
    return to_dcp(source, tmp_path / "dcp", "--keep_embeddings")


def push(hub: Hub, checkpoint: Path, *flags: str, status: int = 0) -> str:
    """Runs the command, which ends with this status, and returns what it says; the token is never in it."""
    output = checkpoint.with_name("out")
    arguments = ("--input_dir", str(checkpoint), "--output_dir", str(output), "--push_to_hub", *flags)
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    done = run([sys.executable, "-c", SCRIPT, *arguments], **environment)
    assert done.returncode == status, done.stdout
    assert TOKEN not in done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def test_a_connection_that_breaks_halfway(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Everything is there after the same command again; what has arrived is neither converted nor sent again."""
    flags = ("--hf_repo_name", "group/model", "--format", "hf", "--max_shard_size", "500KB")
    hub.break_all_but = 1
    said = push(hub, checkpoint, *flags, status=1)
    assert "error: the push to group/model broke off" in said
    assert "the same command again goes on with the push" in said
    assert hub.private == {"group/model": True}
    assert hub.files == {"group/model": {}}
    assert len(hub.objects) == 1

    (arrived,) = hub.objects
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    hub.break_all_but = None
    hub.requests.clear()
    said = push(hub, checkpoint, *flags)
    assert "holds this conversion already" in said
    assert f"pushing to {hub.endpoint}/group/model (private)" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written
    assert f"PUT /objects/{arrived}" not in hub.requests
    assert len([request for request in hub.requests if request.startswith("PUT")]) == len(hub.objects) - 1

    files = hub.files["group/model"]
    assert files.keys() == {path.name for path in written} - {"checkpoint.json"}
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in files.items():
        (downloaded / name).write_bytes(content)
    assert torch.equal(logits(loaded(downloaded)), logits(llama(SHAPE)))
    card = files["README.md"].decode()
    assert 'license: "llama3.1"' in card
    assert "Built with Llama" in card
    assert "| started from | Llama-3.1-8B |" in card


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same Hub for this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_visibility_and_format(here: Hub, checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--push_to_hub", "--hf_repo_name", "model")
    to_llama(checkpoint, tmp_path / "out", *flags, "--public")
    assert here.private == {"somebody/model": False}
    assert here.files["somebody/model"].keys() == {"consolidated.00.pth", "params.json", "README.md"}
    with pytest.raises(ValueError, match="--hf_repo_name somebody/model: the repository exists and is public; say so"):
        to_llama(checkpoint, tmp_path / "another", *flags)
    assert not (tmp_path / "another").exists()


def test_a_login_that_is_refused(here: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ValueError, match=f"the login was refused: {here.endpoint} answers 401") as caught:
        to_llama(checkpoint, tmp_path / "out", "--push_to_hub", "--hf_repo_name", "model")
    assert "hf_another" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_not_there(here: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="cannot be reached: ConnectError"):
        to_llama(checkpoint, tmp_path / "out", "--push_to_hub", "--hf_repo_name", "model")


def test_the_card_of_a_training(world: World, tmp_path: Path) -> None:
    """Data, step, seed, tokens seen and token layout of a training; of what is not known, nothing."""
    argv = ("--job.dump_folder", str(tmp_path), "--training.seed", "17", "--model.rope_scaling", "llama3.1")
    config, model, optimizer = small_model(world, *argv)
    checkpointer = Checkpointer(config, model)
    train_a_little(model, optimizer)
    checkpointer.save(30, {"cursor": 120, "seq_len": 32}, optimizer)
    record = json.loads((tmp_path / "checkpoint/step-30/checkpoint.json").read_text())
    card = model_card("a-model", model.shape, record, None, 0.25)
    for line in (
        "# a-model",
        "| data | synthetic |",
        "| started from | random weights |",
        "| training step | 30 |",
        "| seed | 17 |",
        "| sequence length | 32 |",
        "| tokens seen | 3,840 |",
        "| bits per spike | 0.25 |",
        "| rotary positions | base 500000, scaling llama3.1 |",
        "None is stated.",
    ):
        assert f"\n{line}\n" in card
    assert "(token 255)" in card
    assert "bits per spike" not in model_card("a-model", model.shape, record, None, None)
    assert '\nlicense: "mit"\n' in model_card("a-model", model.shape, record, "mit", None)


def test_the_licence_of_the_source_is_inherited(world: World, checkpoint: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    saved(world, first, *MODEL_FLAGS, "--checkpoint.init_from", str(checkpoint))
    saved(world, second, *MODEL_FLAGS, "--checkpoint.init_from", str(first / "checkpoint"))
    record = json.loads((second / "checkpoint/step-1/checkpoint.json").read_text())
    card = model_card("a-model", SHAPE, record, None, None)
    assert 'license: "llama3.1"' in card
    assert "| started from | Llama-3.1-8B |" in card
    (checkpoint / "checkpoint.json").unlink()
    card = model_card("a-model", SHAPE, record, None, None)
    assert "None is stated; that of the weights it started from, dcp, applies." in card
