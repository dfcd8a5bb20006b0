"""Reads the TOML file and the command line into one `JobConfig`, or says everything that is wrong with them."""

import difflib
import json
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, CliUnknownArgs

from torchtitan.config.retired import RETIRED_KEYS
from torchtitan.config.schema import JobConfig

COMMAND_LINE = "command line"

Values = dict[str, dict[str, Any]]
Check = Callable[[JobConfig], Iterable[tuple[str, str]]]
"""Yields (key, message) for what is wrong with a configuration whose single values are all valid."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, the key (`table.key`), what to say of it."""

    source: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key}{': ' if self.key else ''}{self.message}"


class ConfigError(ValueError):
    """A configuration that cannot be used. `problems` holds everything that was found."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the configuration", *map(str, problems)]))


class _Unreadable(Exception):
    """The configuration file is absent or not TOML."""


class _CommandLine(JobConfig, BaseSettings):
    """Any key of the configuration, as a flag that overrides the file of --job.config_file."""

    unknown: CliUnknownArgs
    """What matches none of the keys."""


def load_config(argv: list[str], checks: Iterable[Check] = ()) -> JobConfig:
    """The configuration that `argv` (without the program's name) describes.

    Reads the TOML file that `--job.config_file` names; `--table.key value` overrides any key of it.
    `checks` look for contradictions between values. `--help` prints all keys and exits.

    Raises:
        ConfigError: listing every unknown key, wrong value and contradiction of the file and of the command line.
    """
    problems: list[Problem] = []
    overrides = _read_command_line(argv, problems)
    path = overrides.get("job", {}).get("config_file")
    from_file = str(path)
    values: Values = {}
    if path is not None:
        try:
            values = _read_toml(path, problems)
        except _Unreadable as error:
            # Without the file nothing can be said of what it may contain.
            raise ConfigError([*problems, Problem(from_file, "", str(error))]) from None
    _reject_unknown(values, from_file, problems)
    for table, keys in overrides.items():
        values.setdefault(table, {}).update(keys)

    def source_of(key: str) -> str:
        table, _, name = key.partition(".")
        if name in overrides.get(table, {}):
            return COMMAND_LINE
        return from_file if name in values.get(table, {}) else "configuration"

    try:
        config = JobConfig.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"][:2]))
            problems.append(Problem(source_of(key), f"{key} = {_show(detail['input'])}", _explain(detail, key)))
        # Without the rejected values the rest can still be checked for contradictions.
        for detail in error.errors():
            table, name, *_ = detail["loc"]
            values[str(table)].pop(str(name), None)
        config = JobConfig.model_validate(values)

    rejected = {problem.key.removeprefix("--").partition(" = ")[0] for problem in problems}
    for check in (_data_is_named, _load_step_is_loaded, *checks):
        for key, message in check(config):
            if key not in rejected:
                problems.append(Problem(source_of(key), key, message))
    if problems:
        raise ConfigError(problems)
    return config


def _data_is_named(config: JobConfig) -> Iterable[tuple[str, str]]:
    training = config.training
    if training.dataset is None and training.dataset_path is None:
        hint = "" if config.job.config_file else "; give a configuration with --job.config_file FILE"
        yield "training.dataset", f"neither training.dataset nor training.dataset_path says what to train on{hint}"
    if training.dataset == "synthetic" and training.dataset_path is not None:
        yield "training.dataset_path", 'contradicts training.dataset = "synthetic", which is made on the fly'


def _load_step_is_loaded(config: JobConfig) -> Iterable[tuple[str, str]]:
    if config.checkpoint.load_step != -1 and not config.checkpoint.enable_checkpoint:
        yield "checkpoint.load_step", "has no effect with checkpoint.enable_checkpoint = false"


def _read_toml(path: str, problems: list[Problem]) -> Values:
    """The tables of the file; what is not a table of keys is reported and left out."""
    try:
        document = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise _Unreadable(f"the file of job.config_file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _Unreadable(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise _Unreadable(f"not valid TOML: {error}") from None
    for key in [key for key, value in document.items() if not isinstance(value, dict)]:
        is_table = key in JobConfig.model_fields
        message = f"is a table, written [{key}]" if is_table else f"stands outside a table{_nearest(key)}"
        problems.append(Problem(path, f"{key} = {_show(document.pop(key))}", message))
    return document


def _reject_unknown(values: Values, source: str, problems: list[Problem]) -> None:
    """Reports the tables and keys of the file that do not exist, and takes them out of `values`."""
    for table in list(values):
        fields = _fields(table)
        for name in [name for name in values[table] if name not in fields]:
            key = f"{table}.{name}"
            problems.append(Problem(source, f"{key} = {_show(values[table].pop(name))}", _explain_unknown(key)))
        if table not in JobConfig.model_fields:
            if not values[table] and not any(problem.key.startswith(f"{table}.") for problem in problems):
                problems.append(Problem(source, f"[{table}]", _explain_unknown(table)))
            del values[table]


def _read_command_line(argv: list[str], problems: list[Problem]) -> Values:
    """The overrides in `argv`, converted to their fields' types; what is not an override is reported."""
    for argument in argv:
        if not argument.isascii() and any("\ud800" <= letter <= "\udfff" for letter in argument):
            problems.append(Problem(COMMAND_LINE, ascii(argument), "not UTF-8 text"))
    complete = _complete_flags(argv, problems)
    # The parser is told to ignore what it does not know, so that this module can report all of it at once.
    given = CliSettingsSource(
        _CommandLine,
        cli_parse_args=complete,
        cli_ignore_unknown_args=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )()
    unknown = cast(list[str], given.pop("unknown", []))
    for before, argument in zip(["", *unknown], unknown, strict=False):
        if argument.startswith("--"):
            key = argument.removeprefix("--").partition("=")[0]
            problems.append(Problem(COMMAND_LINE, f"--{key}", _explain_unknown(key)))
        elif not before.startswith("--") or "=" in before:  # else it is the value of an unknown flag
            problems.append(Problem(COMMAND_LINE, argument, "not a flag; a key is overridden by --table.key value"))

    overrides: Values = {}
    for table, keys in given.items():
        for name, text in keys.items():
            field = _fields(table)[name]
            try:
                value = TypeAdapter(field.annotation).validate_python(text)
            except ValidationError as error:
                detail = error.errors()[0]
                key = f"{table}.{name}"
                problems.append(Problem(COMMAND_LINE, f"{key} = {_show(text)}", _explain(detail, key)))
            else:
                overrides.setdefault(table, {})[name] = value
    return overrides


def _complete_flags(argv: list[str], problems: list[Problem]) -> list[str]:
    """`argv` with each known flag joined to its value, which may then begin with a dash; a bare switch means true.

    Flags without a value, and flags that name a whole table, are reported and dropped.
    """
    complete: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        flag, has_value, _ = argument.partition("=")
        table, _, name = flag.removeprefix("--").partition(".")
        field = _fields(table).get(name) if flag.startswith("--") else None
        value = rest.pop(0) if field and not has_value and rest and not rest[0].startswith("--") else None
        if flag == f"--{table}" and table in JobConfig.model_fields:
            problems.append(Problem(COMMAND_LINE, flag, "is a table; a key of it is overridden by --table.key value"))
        elif field is None or has_value:
            complete.append(argument)
        elif value is not None:
            complete.append(f"{flag}={value}")
        elif field.annotation is bool:
            complete.append(f"{flag}=true")
        else:
            problems.append(Problem(COMMAND_LINE, flag, "needs a value"))
    return complete


def _fields(table: str) -> dict[str, Any]:
    """The fields of a table by name; none where there is no such table."""
    field = JobConfig.model_fields.get(table)
    return cast(type[BaseModel], field.annotation).model_fields if field is not None else {}


def _explain_unknown(key: str) -> str:
    name = key.rpartition(".")[2]
    if name in RETIRED_KEYS:
        return f"has no meaning here: {RETIRED_KEYS[name]}"
    kind = "key" if "." in key else "table"
    return f"unknown {kind}{_nearest(key)}"


def _nearest(key: str) -> str:
    """A hint at the existing key that was probably meant: the same name in another table, or the nearest spelling."""
    tables = list(JobConfig.model_fields)
    keys = [f"{table}.{name}" for table in tables for name in _fields(table)]
    table, _, name = key.lower().rpartition(".")
    elsewhere = [known for known in keys if known.rpartition(".")[2] == name]
    close = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0)
    if not close and table:
        # Names alone are compared: a table's own name would make any two of its keys look alike.
        close = [f"{table}.{match}" for match in difflib.get_close_matches(name, _fields(table), n=1)]
    elif not close:
        close = difflib.get_close_matches(name, tables, n=1)
    if not close:  # a misspelt key in a wrong table
        names = {known.rpartition(".")[2]: known for known in keys}
        close = [names[match] for match in difflib.get_close_matches(name, names, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]}?" if close else f"; `{Path(sys.argv[0]).name} --help` lists all"


def _explain(detail: Any, key: str) -> str:
    """A pydantic error of a key in one line, with the nearest allowed value where there is a list of them."""
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        table, _, name = key.partition(".")
        field = _fields(table).get(name)
        choices = [str(choice) for choice in _literals(field.annotation)] if field is not None else []
        close = [choice for choice in choices if choice.casefold() == detail["input"].casefold()]
        close = close or difflib.get_close_matches(detail["input"], choices, n=1)
        return message + (f"; did you mean '{close[0]}'?" if close else "")
    return message


def _literals(annotation: Any) -> list[Any]:
    """All literal values in a type annotation."""
    return [inner for arg in get_args(annotation) for inner in (_literals(arg) if get_args(arg) else [arg])]


def _show(value: Any) -> str:
    """A value as it would stand in TOML, as far as JSON can write it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)


def dump_toml(config: JobConfig) -> str:
    """The whole configuration as TOML that `load_config` reads back; keys without a value are left out."""
    lines: list[str] = []
    for table, values in config.model_dump().items():
        lines.append(f"[{table}]")
        for key, value in values.items():
            if value is not None:
                # JSON's strings, numbers, booleans and lists are TOML's too, but for two things: TOML has no
                # surrogate pairs, in which JSON escapes letters beyond the 16-bit ones, and no bare DEL.
                shown = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{key} = {shown}")
        lines.append("")
    return "\n".join(lines)
