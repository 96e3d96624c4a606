"""Train a recipe: `python train.py --help`; several processes: `torchrun --nproc_per_node 2 train.py …`."""

import argparse
from pathlib import Path

from modalities import cli, stopping


def main(argv: list[str]) -> None:
    launcher = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False, exit_on_error=False)
    launcher.add_argument("--recipe")
    launcher.add_argument("--model-from", type=Path)
    launcher.add_argument("--dry-run", action="store_true")
    launcher.add_argument("--profile", nargs="?", const="")
    try:
        chosen, overrides = launcher.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"train.py: {error}") from None
    if chosen.recipe is None:
        if argv and argv[0] not in ("-h", "--help"):
            raise ValueError(f"train.py needs --recipe NAME; there are {', '.join(cli.recipe_files())}")
        flags = "[--dry-run] [--profile 10-12] [--name RUN] [--steps N] [--model-from DIR] [--model.… …]"
        print(f"usage: [torchrun …] train.py --recipe NAME {flags}\n")
        print(f"recipes:\n{cli.describe_recipes()}\n\ntrain.py --recipe NAME --help lists every field with its value.")
        return

    if not chosen.dry_run:
        stopping.listen()
    from modalities import recipe as recipes  # after the list, which should not wait for torch

    recipe, source = recipes.load(chosen.recipe)
    if chosen.model_from is not None:
        place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        place.add_argument("--name", default=recipe.name)
        place.add_argument("--log.dir", dest="dir", default=recipe.log.dir)
        run, _ = place.parse_known_args(overrides)
        recipe = recipes.start_from(recipe, chosen.model_from, Path(run.dir, run.name))
    recipe = recipes.parse(recipe, overrides, f"train.py --recipe {chosen.recipe}")
    if chosen.dry_run:
        recipes.dry_run(recipe)
        return

    from modalities.loop import train

    train(recipe, source, chosen.profile)


if __name__ == "__main__":
    cli.run(main)
