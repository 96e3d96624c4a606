"""What every command shares: flags parsed by tyro, and a user's mistake that ends in one line and exit status 1.

It imports nothing heavy, so that `--help` is quick, and knows nothing of training.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from modalities import ranks

T = TypeVar("T")


def run(main: Callable[[list[str]], Any]) -> None:
    """Run `main(argv)`; a `ValueError`, `OSError` or missing package ends in one line on stderr and exit status 1.

    `MODALITIES_DEBUG=1` in the environment shows the traceback instead. Other ends, and what is reported of those that
    a new start may change, are named in `ranks`.
    """
    ranks.begin()
    status, line = ranks.CRASHED, ""
    try:
        main(sys.argv[1:])
        status = 0
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
        print(line, file=sys.stderr)
        sys.exit(status)
    except SystemExit as end:
        status, line = (
            (end.code or 0, getattr(end, "line", "")) if isinstance(end.code, int | None) else (1, str(end.code))
        )
        raise
    except (ValueError, OSError, ImportError) as error:
        status, line = ranks.status_of(error), f"error: {' '.join(str(error).split())}"
        if os.environ.get("MODALITIES_DEBUG") == "1":
            raise
        sys.exit(line)
    except BaseException as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise
    finally:
        ranks.report_end(status, line)


def parse(target: Callable[..., T], args: Sequence[str], **options: Any) -> T:
    """`tyro.cli(target, args=args, **options)` for a dataclass, every complaint a one-line `ValueError`."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(target, args=list(args), **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(complaint.getvalue())) from None


def call(function: Callable[..., T], args: Sequence[str], **options: Any) -> T:
    """Call `function` with what `args` give for its signature; a wrong flag is a one-line `ValueError`."""

    @functools.wraps(function)
    def bind(*positional: Any, **named: Any) -> Any:
        return functools.partial(function, *positional, **named)

    return parse(bind, args, **options)()


def call_subcommand(commands: dict[str, Callable[..., Any]], args: Sequence[str], prog: str, description: str) -> Any:
    """`call` the one of `commands` that `args[0]` names; without a name or with `--help`, list them."""
    if not args or args[0] in ("-h", "--help"):
        rows = [f"  {name:<10} {(inspect.getdoc(f) or '').splitlines()[0]}" for name, f in commands.items()]
        print(f"usage: {prog} COMMAND …\n\n{description}\n\n" + "\n".join(rows) + f"\n\nFlags: {prog} COMMAND --help")
        return None
    if args[0] not in commands:
        raise ValueError(f"{prog} has no command {args[0]!r}; it has {', '.join(commands)}")
    return call(commands[args[0]], args[1:], prog=f"{prog} {args[0]}")


def recipe_files() -> dict[str, Path]:
    """Recipes by name: those in `recipes/` here, and those that come with the package's checkout."""
    folders = (Path(__file__).parents[1] / "recipes", Path("recipes"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}


def find_recipe(name: str) -> Path:
    """The file that `--recipe NAME` means: a name, or a path to a `.py` or `.json`."""
    if name.endswith((".py", ".json")):
        if not Path(name).is_file():
            raise ValueError(f"there is no recipe {name}; give a name, a path to a .py, or a run's recipe.json")
        return Path(name)
    files = recipe_files()
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(files)}"
        raise ValueError(f"there is no recipe {name!r} in recipes/; {hint}")
    return files[name]


def describe_recipes() -> str:
    """A line for every recipe: its name and the first line of its docstring."""
    lines = []
    for name, path in recipe_files().items():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines.append(f"  {name:<14} {docstring.partition(chr(10))[0]}")
    return "\n".join(lines)


def _one_line(box: str) -> str:
    """The sentence in tyro's box of complaint, with its first suggestion."""
    # A box is sections between rules; tyro draws it with dashes or with box characters, as the terminal allows.
    sections: list[list[str]] = [[]]
    for line in (line.strip(" │") for line in box.splitlines()):
        if re.fullmatch(r"[╭╰].*|[─-]+", line):
            sections.append([])
        elif line:
            sections[-1].append(line)
    message = " ".join(sections[1] if len(sections) > 1 else sections[0])
    # tyro counts the values behind an unknown flag as unknown too; name the flag alone.
    message = re.sub(r"(Unrecognized options: --[\w.-]+),.*", r"\1", message)
    message = re.sub(r"^Error parsing [A-Z\w.]+: (?!invalid)", "", message)
    suggestion = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(map(" ".join, sections[2:])))
    return f"{message}; did you mean {suggestion[1]}?" if suggestion else message
