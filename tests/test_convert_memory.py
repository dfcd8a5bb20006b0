"""Conversions hold one tensor at a time: measured in a process of their own, in every direction."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT
from torchtitan.convert.meta import write_meta
from torchtitan.convert.weights import Tensors, Weight, model_weights
from torchtitan.models.llama.shape import ModelShape

SHAPE = ModelShape(dim=1024, n_layers=8, n_heads=16, n_kv_heads=8, ffn_dim=4096, vocab_size=8192)
LARGEST = 8192 * 1024 * 2
CHILD = """
import json, sys, threading, time
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

from torchtitan.convert.arguments import parse_dcp_to_llama, parse_llama_to_dcp
from torchtitan.convert.to_dcp import llama_to_dcp
from torchtitan.convert.to_llama import dcp_to_llama

before = peak = anonymous()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
if sys.argv[1] == "in":
    llama_to_dcp(parse_llama_to_dcp(sys.argv[2:]))
else:
    dcp_to_llama(parse_dcp_to_llama(sys.argv[2:]))
done = True
watcher.join()
Path(sys.argv[sys.argv.index("--output_dir") + 1] + ".json").write_text(json.dumps([before, peak]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 285 MB in bf16, in Meta's format."""
    folder = tmp_path_factory.mktemp("memory") / "source"
    folder.mkdir()
    weights = {name: Weight(shape, torch.bfloat16) for name, shape in model_weights(SHAPE).items()}
    assert max(weight.nbytes for weight in weights.values()) == LARGEST
    assert sum(weight.nbytes for weight in weights.values()) > 15 * LARGEST
    write_meta(folder, SHAPE, Tensors(weights, lambda name: torch.ones(weights[name].shape, dtype=torch.bfloat16)))
    return folder


def peak_above_imports(direction: str, source: Path, output: Path, *flags: str) -> int:
    command = [sys.executable, "-c", CHILD, direction, "--input_dir", str(source), "--output_dir", str(output), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(output.with_name(output.name + ".json").read_text())
    return peak - before


def test_one_tensor_at_a_time(source: Path) -> None:
    """The largest tensor, its copy, the next one, and code loaded on the way: less than half of the model."""
    limit = 3 * LARGEST + 64 * 2**20
    dcp, hf, pth = (source.with_name(name) for name in ("dcp", "hf", "pth"))
    assert peak_above_imports("in", source, dcp, "--keep_embeddings") < limit
    assert peak_above_imports("out", dcp, pth, "--dtype", "float32") < limit + 2 * LARGEST
    assert peak_above_imports("out", dcp, hf, "--format", "hf", "--max_shard_size", "200MB") < limit
    assert peak_above_imports("in", hf, source.with_name("again"), "--keep_embeddings") < limit
