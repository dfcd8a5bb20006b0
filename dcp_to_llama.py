#!/usr/bin/env python3
"""Makes a Llama for other people's code out of a DCP checkpoint, and pushes it to the Hugging Face Hub.

`python dcp_to_llama.py --input_dir INPUT_DIR --output_dir OUTPUT_DIR --hf_repo_name HF_REPO_NAME --push_to_hub`

docs/conversion.md tells the rest.
"""

import sys

from torchtitan.convert.arguments import parse_dcp_to_llama
from torchtitan.convert.errors import one_line_errors
from torchtitan.logging import init_logger

if __name__ == "__main__":
    arguments = parse_dcp_to_llama(sys.argv[1:])
    init_logger()
    with one_line_errors():
        from torchtitan.convert.to_llama import dcp_to_llama

        dcp_to_llama(arguments)
