"""One TOML file and a command line, read into one validated `JobConfig`. Imports no torch."""

from torchtitan.config.load import ConfigError, dump_toml, load_config
from torchtitan.config.schema import JobConfig

__all__ = ["ConfigError", "JobConfig", "dump_toml", "load_config"]
