#!/usr/bin/env python3
"""Continues recordings with what a model has learned.

`python generate.py --checkpoint CHECKPOINT --prompt DATASET:ROW --bins BINS [--samples SAMPLES] …`

`--help` lists all flags; docs/generation.md tells the rest.
"""

import os
import sys

from torchtitan.convert.errors import one_line_errors
from torchtitan.generation.arguments import parse_generate
from torchtitan.logging import init_logger

if __name__ == "__main__":
    arguments = parse_generate(sys.argv[1:])
    init_logger()
    # Prompts of different lengths come and go: segments that grow leave no gaps between them.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with one_line_errors():
        from torchtitan.generation.run import generate

        generate(arguments)
