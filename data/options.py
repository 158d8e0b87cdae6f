"""A flat dataclass becomes a command line: each field's comment is its help, a misspelt name gets a suggestion."""
import dataclasses
import difflib
import inspect
import os
import re
import sys


def fields(config):
    """{field: default} of a dataclass."""
    return {field.name: field.default for field in dataclasses.fields(config)}


def comments(config):
    """{field: the comment beside it in the source}, so that text and code cannot drift apart."""
    notes = {}
    for base in reversed(config.__mro__[:-1]):                 # a Config that extends another keeps its comments
        lines = re.finditer(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(base), re.MULTILINE)
        notes |= {m[1]: m[2].strip() for m in lines}
    return notes


def convert(name, text, default):
    """Command-line text -> the type of the field's default.   raises ValueError naming the option"""
    if isinstance(default, tuple):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(convert(name, part, default[0] if default else "") for part in parts)
    truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        if isinstance(default, bool):
            return truth[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        want = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(default), "a value")
        raise ValueError(f"--{name}={text:.60} should be {want}, such as --{name}={default}") from None


def parse(argv, *configs, command="the command"):
    """Words of a command line -> {option: value}, only what was typed; `--name=value` and `--name value` both work.

    configs  dataclasses whose fields are the options; booleans may stand without a value
    raises   ValueError for an unknown name (with the nearest known one), a missing or an unreadable value
    """
    defaults = {name: default for config in configs for name, default in fields(config).items()}
    typed, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"cannot read '{word:.60}': options look like --steps=100 or --steps 100")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f"did you mean --{near[0]}?" if near else f"{command} --help lists them"
            raise ValueError(f"unknown option --{name:.60}; {hint}")
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif isinstance(defaults[name], bool):
                text = "true"
            else:
                raise ValueError(f"--{name} needs a value, such as --{name}={defaults[name]}")
        typed[name] = convert(name, text, defaults[name])
    return typed


def check_words(config, **known):
    """raises ValueError for the first option whose value is none of its known words;  known: option=words"""
    for name, words in known.items():
        if getattr(config, name) not in words:
            raise ValueError(f"--{name}={getattr(config, name)} is unknown; choose {', '.join(map(str, words))}")


def check_ranges(config, **ranges):
    """raises ValueError for the first option whose value is out of its range;  ranges: option=(least, most)"""
    for name, (least, most) in ranges.items():
        if not least <= getattr(config, name) <= most:
            raise ValueError(f"--{name}={getattr(config, name)} is out of range: choose {least} to {most}")


def page(lines):
    """Print lines; where `| head` has read enough, end without a word instead of with a traceback."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())         # what is left has nowhere to go
        sys.exit()


def show_help(command, *configs):
    """Print every option with its default and its comment; a field of an earlier config hides a later one's."""
    lines, shown = [f"{command} [--option=value ...]\n\n{inspect.getdoc(configs[0])}\n"], set()
    for config in configs:
        notes = comments(config)
        for name, default in fields(config).items():
            if name not in shown:
                shown.add(name)
                value = ",".join(map(str, default)) if isinstance(default, tuple) else default
                lines.append(f"  --{f'{name}={value}':28} {notes.get(name, '')}")
        lines.append("")
    page(lines)


def plain(config):
    """A dataclass as a dict of plain values that JSON and weights-only checkpoints can hold."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def from_plain(config, values):
    """The inverse of `plain`: {field: value} from a checkpoint -> an instance of the dataclass.

    raises ValueError for fields this version of the class does not have
    """
    unknown = values.keys() - fields(config).keys()
    if unknown:
        raise ValueError(f"the checkpoint has options this code does not know: {', '.join(sorted(unknown))}; another version "
                         "wrote it: train again")
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# -- the verbs: python -m FOLDER.VERB [WORDS] [--option=value ...] ------------------------------------------------------------


def words_first(argv):
    """-> the words before the first option, the rest"""
    first = next((n for n, word in enumerate(argv) if word.startswith("--") or word == "-h"), len(argv))
    return argv[:first], argv[first:]


def options_of(argv, config, command):
    """An instance of `config` from the command line; --help shows its options and ends."""
    if {"-h", "--help"} & set(argv):
        show_help(command, config)
        sys.exit()
    return config(**parse(argv, config, command=command))


def run(main):
    """A verb's last line: what a user did wrong becomes one sentence instead of a traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
