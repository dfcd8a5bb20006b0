"""What all tests share: above all a Hugging Face cache of their own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from torchtitan.distributed.world import World

ROOT = Path(__file__).resolve().parents[1]

pytest_plugins = ["tests.reliability"]

# A machine that is busy with other things must not fail a property test for its slowness.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_configure(config: pytest.Config) -> None:
    """Moves the Hugging Face cache before any test module can import `datasets`, which reads these at import."""
    cache = tempfile.mkdtemp(prefix="huggingface-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ.update(
        HF_HOME=cache,
        HF_DATASETS_CACHE=f"{cache}/datasets",
        HF_HUB_CACHE=f"{cache}/hub",
        HF_HUB_OFFLINE="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    )


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face datasets cache in which nothing is yet, for this test alone."""
    import datasets.config

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The framework's log, also where an earlier test has taken it off the root logger."""
    from torchtitan.logging import logger

    monkeypatch.setattr(logger, "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def real_recordings() -> Path:
    """Real recordings in the Neural Pile's format, which lie beside the repository on machines that have them."""
    folder = ROOT.parent / "shared/data/neural_pile_like"
    if not folder.is_dir():
        pytest.skip("no real recordings in ../shared/data/neural_pile_like")
    return folder


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator["World"]:
    """This process as the only one of a run, on the CPU."""
    import torch.distributed as dist

    from torchtitan.distributed.world import init_world

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    yield init_world(60)
    dist.destroy_process_group()
