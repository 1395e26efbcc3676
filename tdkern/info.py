"""`python -m tdkern.info`: what this installation is and can do, for a bug report."""

from ._info import info

if __name__ == "__main__":
    facts = info()
    for name in ("tdkern", "torch", "triton", "numpy", "python"):
        print(f"{name:<10} {facts[name] or 'not installed'}")
    for name, missing in facts["backends"].items():
        print(f"{name:<10} {'not available: ' + missing if missing else 'available'}")
    for name, value in (facts["build"] or {"build": "no compiled part"}).items():
        print(f"{name:<24} {value or 'none'}")
    print(f"devices    {', '.join(facts['devices'])}")
