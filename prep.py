"""From raw documents to `.idx` and `.pbin` files: `python prep.py --help`."""

import os

# No command here multiplies matrices, and BLAS's threads would spin at the start. numpy reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from modalities import cli, ranks
from modalities.commands import COMMANDS


def main(args: list[str]) -> None:
    if ranks.world_size() > 1 and args[:1] != ["pack"]:
        raise ValueError("with torchrun there is only prep.py pack; the other commands are for one process")
    cli.call_subcommand(COMMANDS, args, "prep.py", "From raw documents to .idx and .pbin files.")


if __name__ == "__main__":
    cli.run(main)
