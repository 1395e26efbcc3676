"""How the tests are spread over processes."""

import pytest


@pytest.mark.xdist_group("groups")
def test_tests_of_a_group_run_in_one_process(request):
    """What takes minutes to make would silently be made in each of them."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@groups")
