"""The command line, `tdkern`: each of COMMANDS is a module of its own."""

import importlib
import sys

COMMANDS = (
    "train",
    "generate",
    "fid",
    "detector",
    "dataset",
    "convert",
    "ema",
    "report",
    "bench",
    "demo",
    "ablate",
)
EXTRAS = ("click", "tqdm", "safetensors", "PIL", "matplotlib")  # what tdkern[train] brings

try:
    import click
except ModuleNotFoundError:

    def main(**_: object) -> None:
        sys.exit("tdkern: click is not installed; run: pip install 'tdkern[train]'")
else:
    from .errors import one_line_errors, open_standard_streams

    class Commands(click.Group):
        """Commands that are imported when they are called."""

        def list_commands(self, ctx):
            return list(COMMANDS)

        def get_command(self, ctx, name):
            if name not in COMMANDS:
                return None
            try:
                return getattr(importlib.import_module(f".{name}", __name__), name)
            except ModuleNotFoundError as error:
                if error.name not in EXTRAS:
                    raise
                raise click.ClickException(
                    f"{error.name} is not installed; run: pip install 'tdkern[train]'"
                ) from error

        def main(self, *args, **kwargs):
            open_standard_streams()
            return super().main(*args, **kwargs)

        def invoke(self, ctx):
            with one_line_errors():
                super().invoke(ctx)
                sys.stdout.flush()  # where it cannot be written to, that is an error

    def hyphens(token: str) -> str:
        """--target_ema_tau is --target-ema-tau, and td-weight's pairwise-x0 is pairwise_x0."""
        return token.replace("_", "-")

    @click.group(
        cls=Commands, context_settings={"token_normalize_func": hyphens, "max_content_width": 120}
    )
    def main():
        """Train diffusion models with a temporal-difference loss, and sample from them."""
