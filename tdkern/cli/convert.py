"""`tdkern convert`."""
import click

from ..integrations import convert as run


@click.command()
@click.argument("src")
@click.argument("dst")
def convert(src, dst):
    """Write a network that another program saved as one safetensors file, without running what is in it.

    SRC is EDM's network-snapshot-*.pkl or training-state-*.pt, a state dict of torch.save, or a diffusers folder; DST a new .safetensors
    file. EDM's networks can then be sampled from.

    \b
    tdkern convert network-snapshot.pkl model.safetensors
    tdkern generate --network model.safetensors --outdir images
    """
    try:
        click.echo(run(src, dst))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
