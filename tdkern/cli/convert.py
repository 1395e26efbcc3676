"""`tdkern convert`."""

import click

from ..data.files import one_line
from ..integrations import convert as run
from ..integrations import export_diffusers
from ..training import load_network


@click.command()
@click.argument("src")
@click.argument("dst")
@click.option(
    "--diffusers",
    is_flag=True,
    help="Write the averaged U-Net of SRC as a folder DST that diffusers' UNet2DModel reads.",
)
def convert(src, dst, diffusers):
    """Write a network that another program saved as one file, without running it.

    SRC is EDM's network-snapshot-*.pkl or training-state-*.pt, a state dict of torch.save, or a
    diffusers folder; DST a new .safetensors file. EDM's networks can then be sampled from.

    With --diffusers, SRC is a network snapshot, a run directory or a converted file, of an ADM
    network with levels of 128, 192, 256, ... channels: the one kind of EDM's that a UNet2DModel can
    compute. Preconditioning is then diffusers' EDMEulerScheduler's.

    \b
    tdkern convert network-snapshot.pkl model.safetensors
    tdkern generate --network model.safetensors --outdir images
    tdkern convert --diffusers runs/00000-... unet
    """
    if diffusers:
        done = export_diffusers(load_network(src)[0], dst, name=src)
    else:
        done = run(src, dst)
    click.echo(one_line(done))
