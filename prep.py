"""From raw documents to `.idx` and `.pbin` files: `python prep.py --help`."""

from modalities import cli
from modalities.commands import COMMANDS

if __name__ == "__main__":
    about = "From raw documents to .idx and .pbin files."
    cli.run(lambda args: cli.call_subcommand(COMMANDS, args, "prep.py", about))
