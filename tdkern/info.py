"""`python -m tdkern.info`: what this installation is and can do, for a bug report."""

import sys
import types

from ._info import info


class _Info(types.ModuleType):
    """This module, which `import tdkern.info` puts in the place of the function `tdkern.info`."""

    def __call__(self) -> dict:
        return info()


sys.modules[__name__].__class__ = _Info

if __name__ == "__main__":
    facts = info()
    for name in ("tdkern", "torch", "triton", "numpy", "python"):
        print(f"{name:<10} {facts[name] or 'not installed'}")
    for name, missing in facts["backends"].items():
        print(f"{name:<10} {'not available: ' + missing if missing else 'available'}")
    for name, value in (facts["build"] or {"build": "no compiled part"}).items():
        print(f"{name:<24} {value or 'none'}")
    print(f"devices    {', '.join(facts['devices'])}")
