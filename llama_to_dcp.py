#!/usr/bin/env python3
"""Makes a DCP checkpoint to start from out of a pretrained Llama, in Meta's or Hugging Face's format.

`python llama_to_dcp.py --input_dir INPUT_DIR --output_dir OUTPUT_DIR`

docs/conversion.md tells the rest.
"""

import sys

from torchtitan.convert.arguments import parse_llama_to_dcp
from torchtitan.convert.errors import one_line_errors
from torchtitan.logging import init_logger

if __name__ == "__main__":
    arguments = parse_llama_to_dcp(sys.argv[1:])
    init_logger()
    with one_line_errors():
        from torchtitan.convert.to_dcp import llama_to_dcp

        llama_to_dcp(arguments)
