"""Generation with a cache against the loop that computes everything anew for each token, and the memory's speed.

    python benchmarks/generation.py --flavor debug --context 4096 --json RESULT.json
    python benchmarks/generation.py --flavor 8B --context 100000 --sequences 1 8 --json RESULT.json

Random weights in the precision that the device computes in, random prompts of different recordings. Each attention is
first compared with the uncached model on a small one; what fails there, or does not run, is said and left out.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.card import CardReadings
from benchmarks.command import recorded
from benchmarks.kernel_families import profile_step
from torchtitan.data.tokens import bos_token
from torchtitan.generation.arguments import ATTENTION
from torchtitan.generation.decode import Decoder
from torchtitan.generation.floor import bandwidth, bytes_per_step
from torchtitan.generation.load import empty_model
from torchtitan.generation.sampling import Continuations, Sampling, uniforms
from torchtitan.generation.session import Session
from torchtitan.models.llama.model import Transformer
from torchtitan.models.llama.shape import FLAVORS, ModelShape

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]
PAGE, MARK, END = ROOT / "docs/generation.md", "<!-- by python benchmarks/generation.py --table -->", "<!-- end -->"
NEURONS = 99
WARM_UP, PROFILED = 16, 4
"""Steps before those that are timed, and after them."""
CASES = (((700,), 1), ((700, 310, 64), 2))
"""Tokens of the prompts, and samples of each: one sequence alone takes other kernels than several."""
LARGEST_ERROR = 2e-2
"""Of logits, relative, where both ways round to bf16 some dozens of times; float32 must come within a thousandth."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", choices=tuple(FLAVORS), default="debug")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each prompt (default 4096)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1], help="of different prompts (default 1)")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt, sharing its cache (default 1)")
    parser.add_argument("--steps", type=int, default=192, help="tokens to generate (default 192)")
    parser.add_argument("--uncached-steps", type=int, default=2, help="tokens of the uncached loop (default 2)")
    parser.add_argument("--attention", choices=ATTENTION, nargs="+", default=["triton", "pytorch", "fa3"])
    parser.add_argument("--profile", action="store_true", help="also profile steps, kernels by family (on GPUs)")
    parser.add_argument("--sweep", action="store_true", help="also time the kernels with other tiles (on GPUs)")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the table of docs/generation.md")
    return parser.parse_args(argv)


def random_model(shape: ModelShape, length: int, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model whose weights are drawn where they stay."""
    model = empty_model(shape, length, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        weight = torch.empty(parameter.shape, device=device)
        model.init_parameter(name, weight, generator)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(weight.to(dtype), requires_grad=False))
    return model


def random_prompts(number: int, tokens: int, vocab_size: int, device: torch.device) -> list[torch.Tensor]:
    """Bins of few spikes, int64 [tokens] each; the first bin is cut where they do not fill whole ones."""
    stream = np.minimum(np.random.default_rng(0).poisson(0.3, (number, tokens)), vocab_size - 2)
    stream[:, ::-1][:, NEURONS :: NEURONS + 1] = bos_token(vocab_size)
    return list(torch.from_numpy(stream).to(device))


def session(
    decoder: Decoder, prompts: list[torch.Tensor], samples: int, steps: int, attention: str, temperature: float = 1.0
) -> Session:
    """Sequences of those prompts that have been read in."""
    numbers = list(range(len(prompts)))
    noise = uniforms(0, numbers, samples, steps)
    widths = [NEURONS + 1] * len(noise)
    continuations = Continuations(Sampling(temperature), decoder.shape.vocab_size, widths, noise, decoder.device)
    return Session(decoder, prompts, samples, continuations, attention)


def largest_error(
    model: Transformer, decoder: Decoder, attention: str, lengths: tuple[int, ...], samples: int, steps: int = 20
) -> float:
    """Relative error of the logits of all steps against the uncached model, with prompts of these lengths."""
    prompts = [random_prompts(1, length, 256, decoder.device)[0] for length in lengths]
    running = session(decoder, prompts, samples, steps, attention)
    running.run(steps)
    worst = 0.0
    tokens = running.continuations.tokens_NT
    for sequence in range(len(tokens)):
        prompt = prompts[sequence // samples]
        inputs = torch.cat((prompt, tokens[sequence, :steps]))
        expected = model(inputs[None])[0, len(prompt) :].float()
        running.cache.restart()
        # The tokens are already there: fed again, they give the logits after them.
        found = []
        for step in range(steps):
            logits = decoder.step(tokens[:, step], running.rope, running.cache, running.ops)
            found.append(logits[sequence].float())
            running.cache.advance()
        worst = max(worst, float((torch.stack(found) - expected).norm() / expected.norm()))
    return worst


def usable(attentions: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each attention that runs and is right, of one sequence at a time and of several."""
    shape = replace(FLAVORS["8B"], n_layers=2, dim=1024, n_heads=8, n_kv_heads=2, ffn_dim=2048)
    model = random_model(shape, 1024, device, dtype)
    decoder = Decoder(model)
    allowed = LARGEST_ERROR if dtype == torch.bfloat16 else 1e-3
    errors = {}
    for attention in attentions:
        try:
            error = max(largest_error(model, decoder, attention, *case) for case in CASES)
        except Exception as problem:  # also what compilers raise
            print(f"{attention}: left out: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            continue
        print(f"{attention}: logits differ from the uncached model's by {error:.1e}", flush=True)
        if error <= allowed:
            errors[attention] = error
        else:
            print(f"{attention}: left out: more than {allowed}", flush=True)
    return errors


def uncached_seconds(model: Transformer, prompt: torch.Tensor, steps: int) -> list[float]:
    """Seconds of each token where all of the sequence is computed anew for it; the first, to warm up, left out."""
    tokens, seconds = prompt[None], []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        following = model(tokens)[:, -1, :-1].argmax(-1, keepdim=True)
        following.cpu()
        seconds.append(time.perf_counter() - begun)
        tokens = torch.cat((tokens, following), dim=1)
    return seconds[1:]


def cached(running: Session, arguments: argparse.Namespace, attention: str) -> dict[str, Any]:
    """Seconds of reading the prompts in, and of each token of all of them from then on."""
    device, shape, prompts = running.decoder.device, running.decoder.shape, running.cache.lengths
    running.restart(attention)
    # The host's first steps are slower, and a card that has just worked has another clock.
    running.run(WARM_UP)
    running.decode_seconds, steps = 0.0, arguments.steps - WARM_UP - PROFILED
    with CardReadings() as card:
        running.run(steps)
    step_seconds = running.decode_seconds / steps
    own = WARM_UP + steps / 2
    read = bytes_per_step(shape, running.decoder.dtype.itemsize, prompts, arguments.samples, own)
    rate = bandwidth(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    result = {
        "attention": attention,
        "tiles": None,
        "sequences": running.sequences,
        "prompts": len(prompts),
        "prefill_seconds": running.prefill_seconds,
        "milliseconds_per_step": 1e3 * step_seconds,
        "tokens_per_second": running.sequences / step_seconds,
        "gigabytes_per_step": read / 1e9,
        "terabytes_per_second": read / step_seconds / 1e12,
        "floor_milliseconds": None if rate is None else 1e3 * read / rate,
        "floor_ratio": None if rate is None else step_seconds * rate / read,
        "clock_mhz": card.clock_mhz,
        "power_watts": card.power_watts,
    }
    if device.type == "cuda":
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        if arguments.profile:
            result["profile"] = profile_step(lambda: running.run(PROFILED))
    return result


def all_results(
    decoder: Decoder,
    arguments: argparse.Namespace,
    attentions: list[str],
    uncached_token: float,
    sweep: dict[str, list[dict[str, Any]]] | None,
) -> list[dict[str, Any]]:
    """Those of every number of prompts, with every attention, and with the tiles that a sweep has found fastest."""
    results = []
    for number in arguments.sequences:
        _clear(decoder.device)
        prompts = random_prompts(number, arguments.context, decoder.shape.vocab_size, decoder.device)
        running = session(decoder, prompts, arguments.samples, arguments.steps, attentions[0])
        for attention, swept in [*((name, None) for name in attentions), *([("triton", sweep)] if sweep else [])]:
            try:
                result = cached(running, arguments, attention) if swept is None else tiled(running, arguments, swept)
            except Exception as problem:  # also what compilers raise
                print(f"{number} prompts, {attention}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
                continue
            # The uncached loop computes one sequence after another: together they would not fit.
            result["uncached_ratio"] = 1e3 * uncached_token * result["sequences"] / result["milliseconds_per_step"]
            results.append(result)
            print(_line(result), flush=True)
        del running
    return results


def tiled(running: Session, arguments: argparse.Namespace, sweep: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """As `cached`, by the Triton kernels with the tiles that were fastest."""
    from benchmarks.generation_kernels import fastest_tiles

    with fastest_tiles(sweep, len(running.cache.lengths)) as tiles:
        return {**cached(running, arguments, "triton"), "attention": "triton, swept", "tiles": tiles}


def known(package: str) -> bool:
    """Whether a package of that name is installed."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@torch.inference_mode()
def main() -> None:
    """Runs the benchmark and prints a table."""
    arguments = parse(sys.argv[1:])
    if arguments.table:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = FLAVORS[arguments.flavor]
    errors = usable(arguments.attention, device, dtype)
    _clear(device)

    model = random_model(shape, arguments.context + arguments.steps, device, dtype)
    prompt = random_prompts(1, arguments.context, shape.vocab_size, device)[0]
    uncached = uncached_seconds(model, prompt, arguments.uncached_steps)
    uncached_token = statistics.mean(uncached)
    print(f"uncached: {1e3 * uncached_token:,.1f} ms a token of one sequence of {arguments.context:,}", flush=True)
    decoder = Decoder(model)
    sweep = None
    if arguments.sweep and device.type == "cuda":
        from benchmarks.generation_kernels import sweep_kernels

        sweep = sweep_kernels(decoder, arguments.context)
    results = all_results(decoder, arguments, list(errors), uncached_token, sweep)
    headers = ["attention", "sequences", "prompts", "prefill s", "ms a token", "tokens/s", "TB/s", "floor ms"]
    headers += ["× floor", "× uncached"]
    print("\n" + tabulate([_row(result) for result in results], headers, floatfmt=".2f", missingval="–"))
    summary = {
        "command": recorded(["python", *sys.argv], arguments.json),
        "flavor": arguments.flavor,
        "context": arguments.context,
        "steps": arguments.steps,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "uncached_attention": model.attention.backend.title,
        "uncached_milliseconds": [1e3 * seconds for seconds in uncached],
        "logit_errors": errors,
        "results": results,
        "sweep": sweep,
        "versions": {name: version(name) for name in ("torch", "triton", "flash-attn-3", "flash_attn") if known(name)},
        "cuda": torch.version.cuda,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def table(folder: Path) -> str:
    """The table of all results, for the documentation."""
    rows = []
    for path in sorted(folder.glob("generation_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for result in found["results"]:
            floor = result["floor_ratio"]
            what = f"{found['flavor']}, {found['dtype']}, {found['context']:,} tokens, {found['device']}"
            each = f"{result['sequences']} of {result['prompts']} prompts"
            figures = [f"{result['milliseconds_per_step']:.2f}", f"{result['tokens_per_second']:,.0f}"]
            figures += ["" if floor is None else f"{result['floor_milliseconds']:.2f} ms, {floor:.2f} ×"]
            figures += [f"{result['uncached_ratio']:,.0f} ×", f"{result['prefill_seconds']:.1f}"]
            rows.append([what, each, result["attention"], *figures])
    headers = ["what", "sequences", "attention", "ms a token", "tokens/s", "floor", "uncached", "prompts read in, s"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def with_table(page: str) -> str:
    """The page with the table of the results in its place."""
    return f"{page.split(MARK)[0]}{MARK}\n\n{table(ROOT / 'benchmarks/results')}\n\n{END}{page.split(END)[1]}"


def _row(result: dict[str, Any]) -> list[Any]:
    columns = ("attention", "sequences", "prompts", "prefill_seconds", "milliseconds_per_step", "tokens_per_second")
    columns += ("terabytes_per_second", "floor_milliseconds", "floor_ratio", "uncached_ratio")
    return [result[column] for column in columns]


def _line(result: dict[str, Any]) -> str:
    ratio = "" if result["floor_ratio"] is None else f", {result['floor_ratio']:.2f} × the floor"
    return (
        f"{result['prompts']} prompts, {result['attention']}: {result['milliseconds_per_step']:.2f} ms a token{ratio}, "
        f"{result['uncached_ratio']:,.0f} × the uncached loop; read in within {result['prefill_seconds']:.1f} s"
    )


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
