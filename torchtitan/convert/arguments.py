"""The command lines of both conversions. Imports no torch: what is wrong with one is said at once."""

import argparse
import re

from torchtitan.flags import FlagParser
from torchtitan.models.llama.shape import FLAVORS

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_llama_to_dcp(argv: list[str]) -> argparse.Namespace:
    """What `llama_to_dcp.py` was asked for; exits with code 2 where that makes no sense."""
    parser = _parser("Converts a Llama in Meta's or Hugging Face's format to a DCP checkpoint to start from.")
    parser.add_argument(
        "--keep_embeddings",
        action="store_true",
        help="convert the input and output layers too, which else are left out: they belong to another vocabulary",
    )
    return parser.parse(argv)


def parse_dcp_to_llama(argv: list[str]) -> argparse.Namespace:
    """What `dcp_to_llama.py` was asked for; exits with code 2 where that makes no sense."""
    parser = _parser("Converts a DCP checkpoint to Meta's or Hugging Face's format, and pushes it to the Hub.")
    parser.add_argument("--format", choices=("pth", "hf"), default="pth", help="Meta's (default) or Hugging Face's")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="round to or widen to it; default: as stored")
    parser.add_argument("--max_shard_size", type=_size, metavar="SIZE", help="of --format hf; default: 5GB")
    parser.add_argument("--flavor", choices=tuple(FLAVORS), help="shape of a checkpoint that does not record it")
    parser.add_argument("--push_to_hub", action="store_true", help="upload the result to the Hugging Face Hub")
    parser.add_argument("--hf_repo_name", metavar="NAME", help="repository of --push_to_hub: [user or group/]name")
    parser.add_argument("--public", action="store_true", help="make the repository public; default: private")
    parser.add_argument("--license", help="for the model card; default: that of the source weights")
    parser.add_argument("--bits_per_spike", type=float, metavar="BITS", help="for the model card, if evaluated")
    arguments = parser.parse(argv)
    if arguments.push_to_hub and not arguments.hf_repo_name:
        parser.error("--push_to_hub needs --hf_repo_name")
    if arguments.public and not arguments.push_to_hub:
        parser.error("--public has no meaning without --push_to_hub")
    if arguments.max_shard_size and arguments.format != "hf":
        parser.error("--max_shard_size has no meaning without --format hf: a .pth is one file")
    return arguments


def _parser(description: str) -> FlagParser:
    parser = FlagParser(description=description)
    parser.add_argument("--input_dir", required=True, help="folder or blob URL")
    parser.add_argument("--output_dir", required=True, help="folder or blob URL, to be made")
    parser.add_argument("--rope_scaling", choices=("llama3.1", "none"), help="where the input does not say it")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    return parser


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])
