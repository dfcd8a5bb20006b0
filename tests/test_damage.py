"""Damaged checkpoints are detected, named, and refused or skipped."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import read_checkpoint, resume, saved
from tests.models import small_model
from torchtitan.checkpoint import folders, manifest
from torchtitan.checkpoint.checkpointer import Checkpointer
from torchtitan.checkpoint.manifest import DamagedCheckpointError, OtherFormatError, read_manifest
from torchtitan.checkpoint.reader import SafeReader
from torchtitan.checkpoint.verify import checkpoints_in, damage_of
from torchtitan.checkpoint.verify import main as verify
from torchtitan.distributed.world import World

FILES = ("__0_0.distcp", ".metadata", "checkpoint.json")


@pytest.fixture
def steps(world: World, tmp_path: Path) -> Path:
    """The checkpoint folder of a run with steps 1 and 2."""
    saved(world, tmp_path, steps=(1, 2))
    return tmp_path / "checkpoint"


def resumed_step(world: World, steps: Path, *argv: str) -> int:
    record = resume(*small_model(world, "--job.dump_folder", str(steps.parent), *argv))
    assert record is not None
    return record["step"]


def absent(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flipped(path: Path) -> None:
    flip(path, len(path.read_bytes()) * 4)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.fault("damage", "shard, metadata or manifest absent, cut, longer, flipped", 1, "named; refused or skipped")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [absent, cut_short, longer, flipped])
def test_damage_is_named_and_refused_or_skipped(
    world: World, steps: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(steps / "step-2" / name)
    assert damage_of(steps / "step-2") is not None
    with pytest.raises(DamagedCheckpointError, match=rf"step-2 is damaged: .*{name}"):
        resumed_step(world, steps)
    assert resumed_step(world, steps, "--checkpoint.fall_back") == 1
    assert sorted(path.name for path in steps.iterdir()) == ["step-1", "step-2.damaged-1"]


def test_another_version_s_checkpoint_is_not_damaged(
    world: World, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, but not set aside: it may be good."""
    monkeypatch.setattr(manifest, "FORMAT", 4)
    with pytest.raises(OtherFormatError, match=r"step-2 was written in format 3, and this version .* format 4"):
        resumed_step(world, steps, "--checkpoint.fall_back")
    assert damage_of(steps / "step-2") == "of format 3, which this version cannot read"
    assert sorted(path.name for path in steps.iterdir()) == ["step-1", "step-2"]


def test_what_was_generated_with_a_step_is_no_checkpoint(steps: Path) -> None:
    (steps.parent / "generation/step-2/pile-0").mkdir(parents=True)
    assert checkpoints_in(steps.parent) == [steps / "step-1", steps / "step-2"]


def test_verification_is_good_only_where_all_are(steps: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    one, other, nothing = (str(path) for path in (steps / "step-1", steps, tmp_path / "nothing"))
    assert verify([one, other]) == 0
    assert verify([one, nothing]) == 2
    for path in (steps / "step-2").iterdir():
        path.unlink()
    assert verify([one, other]) == verify([other, nothing]) == 1


def places(steps: Path) -> Iterator[tuple[Path, int]]:
    """Bits at random in every kind of file, the configuration's part of the manifest among them."""
    dice = random.Random(0)
    step = steps / "step-2"
    for name in FILES:
        for _ in range(50):
            yield step / name, dice.randrange((step / name).stat().st_size * 8)
    manifest = (step / FILES[2]).read_text()
    start, stop = manifest.index('"config"'), manifest.index('"versions"')
    for _ in range(50):
        yield step / FILES[2], dice.randrange(start * 8, stop * 8)


@pytest.mark.fault("damage", "200 bits, 42 cuts, in all kinds of files", 242, "all detected")
def test_single_bits_and_truncations_are_all_detected(steps: Path) -> None:
    """200 flips and 40 truncations; loading detects them by the same checksums, as the test before shows."""
    whole = steps.with_name("whole")
    shutil.copytree(steps, whole)
    undetected = []
    for path, bit in places(whole):
        target = steps / path.relative_to(whole)
        flip(target, bit)
        if damage_of(target.parent) is None:
            undetected.append((path.name, bit))
        flip(target, bit)
    dice = random.Random(1)
    for name in FILES:
        target = steps / "step-2" / name
        content = target.read_bytes()
        for _ in range(40 // len(FILES) + 1):
            target.write_bytes(content[: dice.randrange(len(content))])
            if damage_of(target.parent) is None:
                undetected.append((name, "cut"))
        target.write_bytes(content)
    assert not undetected
    assert damage_of(steps / "step-2") is None


@pytest.mark.fault("damage", "bits of a shard, while it is loaded", 20, "all detected")
def test_flips_of_weights_are_detected_while_they_are_loaded(world: World, steps: Path) -> None:
    shard = steps / "step-2/__0_0.distcp"
    size, dice = shard.stat().st_size, random.Random(2)
    config, model, optimizer = small_model(world, "--job.dump_folder", str(steps.parent))
    checkpointer = Checkpointer(config, model)
    for _ in range(20):
        bit = dice.randrange(size * 8)
        flip(shard, bit)
        found = checkpointer.find()
        assert found is not None
        with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp differs from its checksum"):
            checkpointer.load(found, optimizer)
        flip(shard, bit)
    assert resumed_step(world, steps) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of 2 GiB"), RuntimeError("[enforce] can't allocate memory")])
def test_what_is_not_the_checkpoints_fault_does_not_set_it_aside(
    world: World, steps: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(SafeReader, "read_data", fail)
    with pytest.raises(ValueError, match="step-2 cannot be read"):
        resumed_step(world, steps, "--checkpoint.fall_back")
    assert sorted(path.name for path in steps.iterdir()) == ["step-1", "step-2"]


def test_sizes_alone_do_not_see_a_changed_weight(world: World, steps: Path) -> None:
    """What `verify = "size"` costs."""
    step = steps / "step-2"
    weight = read_checkpoint(step)["model.norm.weight"]
    position = (step / FILES[0]).read_bytes().index(weight.numpy().tobytes())
    flip(step / FILES[0], position * 8)
    assert damage_of(step, contents=False) is None
    assert resumed_step(world, steps, "--checkpoint.verify", "size") == 2
    with pytest.raises(DamagedCheckpointError):
        resumed_step(world, steps)


def test_a_damaged_step_is_neither_kept_nor_counted(world: World, steps: Path) -> None:
    """The newest good step is never removed, however many damaged ones are newer."""
    flipped(steps / "step-2/checkpoint.json")
    folders.keep_latest(steps, 1)
    assert folders.complete_steps(steps) == [1]
    assert (steps / "step-2").is_dir()


def test_without_an_undamaged_step_nothing_begins_anew(world: World, steps: Path) -> None:
    for step in (1, 2):
        (steps / f"step-{step}" / FILES[0]).unlink()
    with pytest.raises(ValueError, match=r"no step in .* is undamaged"):
        resumed_step(world, steps, "--checkpoint.fall_back")
    for again in ((), ("--checkpoint.fall_back",)):
        with pytest.raises(ValueError, match=r"undamaged: step-1\.damaged-1, step-2\.damaged-1 may still be mended"):
            resumed_step(world, steps, *again)


def test_a_step_that_is_asked_for_is_taken_whatever_became_of_newer_ones(world: World, steps: Path) -> None:
    (steps / "step-2" / FILES[0]).unlink()
    assert resumed_step(world, steps, "--checkpoint.load_step", "1") == 1
    assert sorted(path.name for path in steps.iterdir()) == ["step-1", "step-2.superseded-1"]


def test_a_damaged_load_step_is_refused(world: World, steps: Path) -> None:
    (steps / "step-1" / FILES[0]).unlink()
    with pytest.raises(DamagedCheckpointError, match="step-1 is damaged"):
        resumed_step(world, steps, "--checkpoint.load_step", "1", "--checkpoint.fall_back")


def test_a_forged_manifest_of_another_format_is_named(steps: Path) -> None:
    path = steps / "step-2/checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    with pytest.raises(DamagedCheckpointError, match="its checksum is another"):
        read_manifest(path.parent)
