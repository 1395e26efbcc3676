"""KID, precision and recall, density and coverage: against torch-fidelity 0.4.0 and prdc 0.2, whose
numbers in float64 are recorded, and by hand; and what `tdkern fid` makes of them.
"""

import importlib
import json

import numpy as np
import pytest
import torch

from helpers import golden_of
from helpers.tiny import data_set, in_two_processes, invoked, pixels
from tdkern.cli import main
from tdkern.data import save_image
from tdkern.evaluation import features
from tdkern.evaluation.features import kernel_distance, precision_recall_density_coverage
from tdkern.evaluation.fid import Statistics, read_features, read_statistics, write_statistics

cli = importlib.import_module("tdkern.cli.fid")
PEERS = golden_of("metrics_peers")
REAL, GENERATED = PEERS["real"], PEERS["generated"]


class StandIn:
    """A detector of six features that is no linear function of the images."""

    dim = 6
    name = "inception"
    identity = "inception-v3"

    def __init__(self, weights=None, device="cpu"):
        pass

    def __call__(self, images):
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(images[0].numel(), self.dim, generator=generator)
        return (images.float().flatten(1) @ weights / 2000).sin()


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cli, "make_detector", StandIn)


# ---- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "subsets"), [(50, 10), (1000, 3)])
def test_kid_is_torch_fidelitys(size, subsets):
    """The same subsets too; of fewer images than a subset has, all."""
    found = kernel_distance(GENERATED, REAL, subsets=subsets, subset_size=size)
    assert found == pytest.approx(PEERS[f"kid_{size}"].tolist(), rel=1e-12)


def test_kid_by_hand():
    """Every pair of the definition, in a loop; and on average 0 for one distribution."""
    x, y = REAL[:7].double(), GENERATED[:7].double()

    def k(a, b):
        return (a @ b / 12 + 1).item() ** 3

    same = sum(k(z[i], z[j]) / 42 for z in (x, y) for i in range(7) for j in range(7) if i != j)
    cross = sum(k(a, b) / 49 for a in x for b in y)
    found = kernel_distance(x, y, subsets=1, subset_size=7)
    assert found.mean == pytest.approx(same - 2 * cross, rel=1e-12) and found.std == 0
    both = torch.randn(2, 1000, 4, generator=torch.Generator().manual_seed(0))
    null = kernel_distance(*both, subsets=200, subset_size=20)
    assert abs(null.mean) < 4 * null.std / 200**0.5 and null.std > 0
    assert kernel_distance(*both) != kernel_distance(*both, seed=1, subset_size=20)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 24])
def test_precision_recall_density_and_coverage_are_their_peers(monkeypatch, chunk):
    """However many distances are held at once."""
    monkeypatch.setattr(features, "CHUNK", chunk)
    found = precision_recall_density_coverage(GENERATED, REAL)
    assert found[:2] == pytest.approx(PEERS["precision_recall"].tolist(), rel=1e-6)
    assert found[2:] == pytest.approx(PEERS["prdc_5"][2:].tolist(), rel=1e-12)
    threes = precision_recall_density_coverage(GENERATED, REAL, density_neighbours=3)
    assert threes == pytest.approx(PEERS["prdc_3"].tolist(), rel=1e-12)


def test_prdc_by_hand():
    """On a line, with k = 1: the balls of the real 0, 1, 3 have the radii 1, 1, 2."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[-0.5], [-4.0], [0.5]])
    found = precision_recall_density_coverage(generated, real, neighbours=1, density_neighbours=1)
    # generated radii 1, 3.5, 1: 0 and 1 of the real ones lie within 1 of -0.5 or of 0.5
    assert found == pytest.approx((2 / 3, 2 / 3, 3 / 3, 2 / 3))
    far = precision_recall_density_coverage(GENERATED + 100, REAL)
    assert far == (0, 0, 0, 0)
    same = precision_recall_density_coverage(REAL.flip(0), REAL)
    assert same[:2] == (1, 1) and same.coverage == 1 and same.density >= 1


def test_features_far_from_0_lose_nothing():
    near = precision_recall_density_coverage(GENERATED.double(), REAL.double())
    assert precision_recall_density_coverage(GENERATED.double() + 1e5, REAL.double() + 1e5) == near


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(REAL, REAL[:, :3]), r"generated and real must be \[N, d\] and"),
        (lambda: kernel_distance(REAL[0], REAL), r"must be .* got \[12\] and \[170, 12\]"),
        (lambda: kernel_distance(REAL[:1], REAL), "must have at least 2 images each, got"),
        (lambda: kernel_distance(REAL, REAL, subsets=0), "subsets must be at least 1"),
        (lambda: kernel_distance(REAL, REAL, subset_size=1), "subset_size at least 2, got 100 and"),
        (
            lambda: precision_recall_density_coverage(REAL[:5], REAL),
            "must have at least 6 images each",
        ),
        (
            lambda: precision_recall_density_coverage(REAL, REAL, neighbours=0),
            "neighbours and density_neighbours must be at least 1, got 0 and 5",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the command -------------------------------------------------------------------------------


def features_of(images):
    return StandIn()(torch.from_numpy(images).expand(-1, 3, -1, -1))


def images_and_reference(tmp_path):
    """Two sets of images; the reference's features come from the first, the second are a folder."""
    real, others = pixels(30, seed=1), pixels(21, seed=2)
    data, ref = data_set(tmp_path / "a.zip", real), tmp_path / "ref.npz"
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(others):
        save_image(folder / f"{i:06d}.png", torch.from_numpy(image))
    args = ("fid", "ref", "--data", data, "--dest", ref, "--batch", "7", "--workers", "0")
    invoked(*args, "--features")
    return real, others, folder, ref, args


def test_calc(tmp_path, stand_in):
    real, others, folder, ref, args = images_and_reference(tmp_path)
    torch.testing.assert_close(read_features(ref), features_of(real), rtol=1e-6, atol=1e-6)
    calc = ("fid", "calc", "--images", folder, "--ref", ref, "--num", "21", "--workers", "0")
    generated, kept = features_of(others), features_of(real)
    expected = {
        "fid": float(invoked(*calc).stdout),
        "kid": kernel_distance(generated, kept).mean,
        "kid_std": kernel_distance(generated, kept).std,
        **precision_recall_density_coverage(generated, kept)._asdict(),
    }
    for metrics, names in {
        "fid,kid,prdc": list(expected),
        "prdc,kid": ["kid", "kid_std", "precision", "recall", "density", "coverage"],
        "kid": ["kid", "kid_std"],
        "kid,fid": ["fid", "kid", "kid_std"],
    }.items():
        result = invoked(*calc, "--metrics", metrics)
        *lines, last = result.stdout.splitlines()
        found = json.loads(last)
        assert list(found) == ["images", "ref", "detector", "num", "seed", *names]
        assert [line.split()[0] for line in lines] == names
        for line, name in zip(lines, names, strict=True):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)
            assert float(line.split()[1]) == pytest.approx(found[name], rel=1e-5)
        assert ("biased upwards" in result.stderr) == ("fid" in metrics)
    plain = tmp_path / "plain.npz"
    invoked(*args[:5], plain, *args[6:])
    assert np.array_equal(read_statistics(plain).mu, read_statistics(ref).mu)
    refused = invoked(*calc[:5], plain, *calc[6:], "--metrics", "kid", code=1).output
    message = f"Error: {plain}: not an .npz file of features"
    assert message in refused and "make one with tdkern fid ref --features" in refused
    refused = invoked(*calc, "--metrics", "fid,is", code=2).output
    assert "must be a list of fid, kid, prdc with the detector inception, got 'fid,is'" in refused


def test_files_of_features(tmp_path):
    statistics, path = Statistics(np.zeros(6), np.eye(6)), tmp_path / "a.npz"
    for wrong in (torch.ones(3), torch.full((3, 6), float("nan"))):
        write_statistics(path, statistics, wrong)
        with pytest.raises(ValueError, match=r"a.npz: features must be \[N, d\], all finite, got"):
            read_features(path)
    write_statistics(path, statistics, REAL)
    assert torch.equal(read_features(path), REAL)


def test_steps_measures_them_too(tmp_path, stand_in, monkeypatch):
    real, others, _, ref, _ = images_and_reference(tmp_path)

    def sample(net, network, seeds, sigmas, sampler):
        return torch.from_numpy(others[seeds]) // (len(sigmas) - 1)

    net = torch.nn.Identity()
    monkeypatch.setattr(cli, "load_network", lambda *_: (net, {"network": {"img_channels": 3}}))
    monkeypatch.setattr(cli, "sample", sample)
    monkeypatch.setattr(cli, "sampling_levels", lambda net, name, count: (range(count + 1), {}))
    args = ("fid", "steps", "--network", "a", "--ref", ref, "--steps", "2,3", "--num", "21")
    *table, last = invoked(*args, "--batch", "5", "--metrics", "fid,kid,prdc").stdout.splitlines()
    names = ["fid", "kid", "kid_std", "precision", "recall", "density", "coverage"]
    assert table[0].split() == ["steps", "NFE", "FID", *names[1:]]
    for row, line, count in zip(json.loads(last)["results"], table[1:], (2, 3), strict=True):
        assert list(row) == ["steps", "nfe", *names]
        generated = features_of(others // count)
        assert row["kid"] == pytest.approx(kernel_distance(generated, features_of(real)).mean)
        assert [float(word) for word in line.split()[2:]] == pytest.approx(
            [row[name] for name in names], abs=1e-4
        )


def _rank(rank, args):
    """One of two processes."""
    cli.make_detector = StandIn
    main(args, standalone_mode=False)


@pytest.mark.parametrize("batch", ["3", "11"])
def test_two_processes_write_the_features_in_order(tmp_path, stand_in, batch):
    """Also where the second has none: one batch."""
    data = data_set(tmp_path / "a.zip", pixels(11))
    args = ["fid", "ref", "--data", str(data), "--batch", batch, "--workers", "0", "--features"]
    args += ["--dest", str(tmp_path / "a.npz")]
    in_two_processes(_rank, args)
    two = read_features(args[-1])
    invoked(*args)
    torch.testing.assert_close(two, read_features(args[-1]), rtol=1e-6, atol=1e-6)
    assert two.shape == (11, 6)
