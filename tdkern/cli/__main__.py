"""`python -m tdkern.cli`, for torchrun.

`torchrun --standalone --nproc_per_node=8 -m tdkern.cli train ...`
"""

from . import main

main(prog_name="tdkern")
