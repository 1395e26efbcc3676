"""Fits the mixtures of tdkern.ablation's problems to CIFAR-10, and writes the package's files:
python bench/fit_problems.py --data cifar10-train-32x32.zip
"""

from pathlib import Path

import click
import torch

from tdkern.ablation.problems.fit import RECIPES, fit_problem
from tdkern.ablation.problems.low_rank import DATA, save
from tdkern.data import ImageDataset


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True), help="The 32 x 32 images.")
@click.option("--problem", "names", multiple=True, type=click.Choice(list(RECIPES)))
@click.option("--outdir", type=click.Path(path_type=Path), default=DATA, show_default=True)
def main(data, names, outdir):
    """Fit the problems (default: all) to a data set with classes."""
    torch.set_num_threads(1)
    dataset = ImageDataset(data, use_labels=True, cache=True)
    outdir.mkdir(parents=True, exist_ok=True)
    for name in names or RECIPES:
        recipe = RECIPES[name]
        mixture = fit_problem(dataset, recipe)
        path = outdir / f"{name}.safetensors"
        save(path, mixture, (dataset.image_shape[0], recipe.size, recipe.size), recipe.basis)
        print(f"{path}: {len(mixture.weights)} components, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
