"""What the tests of training share."""

import pytest

from helpers.run_dirs import OK, coarse
from helpers.tiny import ended, train_args


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A run in one go, ten steps."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    args = train_args(OK, run_dir, 80e-6, coarse())
    assert ended(args, run_dir.parent / "log")[0] == 0
    return run_dir
