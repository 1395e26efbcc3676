import importlib
import io
import json
import os
import pickle
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch

from helpers import DATA
from helpers.runs import poison
from helpers.tiny import data_set, in_two_processes, invoked, pixels
from tdkern.cli import main
from tdkern.cli.errors import one_line_errors
from tdkern.data import DatasetError, save_image
from tdkern.evaluation import fid
from tdkern.evaluation.fid import (
    FeatureSums,
    Inception,
    Statistics,
    features_of,
    frechet_distance,
    read_statistics,
    write_statistics,
)
from tdkern.networks import MLP, EDMPrecond
from tdkern.training import Options, Trainer
from tdkern.training.checkpoint import SNAPSHOT, write
from tdkern.training.distributed import Process, this_process

cli = importlib.import_module("tdkern.cli.fid")


class StandIn:
    """A detector of six features that is no linear function of the images."""

    dim = 6
    name = "inception"
    identity = "inception-v3"

    def __init__(self, weights=None, device="cpu"):
        pass

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        generator = torch.Generator().manual_seed(0)
        return (
            images.float().flatten(1)
            @ torch.randn(images[0].numel(), self.dim, generator=generator)
            / 2000
        ).sin()


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cli, "make_detector", StandIn)


def golden(name):
    data = np.load(DATA / f"fid_{name}.npz")
    return (
        data,
        Statistics(data["mu"], data["sigma"]),
        Statistics(data["mu_ref"], data["sigma_ref"]),
    )


@pytest.mark.parametrize(
    "name",
    [
        "d8_full",
        "d8_near",
        "d8_rankdef",
        "d8_rankdef_both",
        "d8_same",
        "d64_full",
        "d64_near",
        "d64_rankdef",
        "d64_rankdef_both",
    ],
)
def test_distance_is_edms(name):
    data, ours, theirs = golden(name)
    # where the recorded values are that far from 0
    absolute = 4e-10 if name == "d8_same" else 1e-10
    assert frechet_distance(ours, theirs) == pytest.approx(
        float(data["fid_eigh"]), rel=1e-8, abs=absolute
    )
    assert frechet_distance(theirs, ours) == pytest.approx(
        float(data["fid"]), rel=2e-8, abs=absolute
    )


def test_distance_of_singular_covariances():
    """|mu_a - mu_b|^2 + sum (sqrt a - sqrt b)^2 where the eigenvectors are the same."""
    a, b = np.array([9.0, 4.0, 1.0, 0.0, 0.0, 0.0]), np.array([4.0, 0.0, 1.0, 1e-12, 1.0, 0.0])
    first, second = Statistics(np.full(6, 0.5), np.diag(a)), Statistics(np.full(6, 1.0), np.diag(b))
    assert frechet_distance(first, second) == pytest.approx(
        1.5 + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-14
    )
    with pytest.raises(
        ValueError, match="frechet_distance: b must have 6 features as a has, got 8"
    ):
        frechet_distance(first, golden("d8_full")[1])


def test_statistics_are_edms():
    data, *expected = golden("d8_full")
    # "images" that hold the features
    detector = type("Given", (), {"dim": 8, "__call__": lambda self, images: images[:, 2, 0]})()
    for features, statistics in zip(
        (data["features"], data["features_ref"]), expected, strict=True
    ):
        sums = FeatureSums(detector)
        for batch in torch.from_numpy(features)[:, None, None].split(7):
            sums.add(features_of(batch, detector))
        ours = sums.statistics()
        np.testing.assert_allclose(ours.mu, statistics.mu, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(ours.sigma, statistics.sigma, rtol=1e-12, atol=1e-12)
    one = FeatureSums(detector)
    one.add(features_of(batch[:1], detector))
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, got 1"):
        one.statistics()


def test_files_of_statistics(tmp_path, monkeypatch):
    (_, statistics, other), path, old = golden("d8_full"), tmp_path / "a.npz", tmp_path / "old.npz"
    write_statistics(path, other)
    old.hardlink_to(path)
    write_statistics(path, statistics)
    # a new file took the old one's name: it was never half-written
    assert np.array_equal(read_statistics(old).mu, other.mu)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "old.npz"]
    fetched = []
    monkeypatch.setattr(
        fid, "urlopen", lambda url, timeout: fetched.append(url) or io.BytesIO(path.read_bytes())
    )
    for read in (read_statistics(path), read_statistics("https://a.b/c.npz")):
        assert all(np.array_equal(one, other) for one, other in zip(read, statistics, strict=True))
    assert fetched == ["https://a.b/c.npz"]


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """An object that makes a directory when it is unpickled."""
    monkeypatch.setenv("EVIL", str(tmp_path / "made"))
    yield Evil()
    assert not (tmp_path / "made").exists()


def test_files_that_are_no_statistics_are_refused(tmp_path, evil):
    mu, sigma, path = np.zeros(3), np.eye(3), tmp_path / "a.npz"

    def refused(message):
        with pytest.raises(
            ValueError, match=rf"^{path}: {message}.*; make one with tdkern fid ref$"
        ):
            read_statistics(path)

    refused("not an .npz file of mu and sigma .*No such file")
    for write_bad in (
        lambda: path.write_bytes(pickle.dumps({"mu": evil})),
        lambda: np.savez(path, mu=np.array([evil]), sigma=sigma),
        lambda: np.savez(path, mu=mu),
        lambda: np.savez(path, mu="words", sigma=sigma),
        lambda: np.save(path.open("wb"), mu),
        lambda: (np.savez(path, mu=mu, sigma=sigma), path.write_bytes(path.read_bytes()[:-30])),
    ):
        write_bad()
        refused("not an .npz file of mu and sigma")
    for bad in (
        {"mu": mu[None], "sigma": sigma},
        {"mu": mu, "sigma": sigma[:2]},
        {"mu": mu * np.nan, "sigma": sigma},
    ):
        np.savez(path, **bad)
        refused(r"mu must be \[d\] and sigma \[d, d\], both finite, got")


class TorchFidelity(torch.nn.Module):
    """torch-fidelity's extractor as far as it is used: it unpickles what it is given, whatever that
    is.
    """

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.fc = torch.nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images):
        return (self.fc(images.float().mean((2, 3))),)


def test_inception_from_a_file_of_weights(tmp_path, monkeypatch, evil):
    """torch-fidelity is not here: a module of its name. What is tested is what surrounds it."""
    url = "https://a.b/weights-inception-6726825d.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules,
        "torch_fidelity.feature_extractor_inceptionv3",
        SimpleNamespace(URL_INCEPTION_V3=url, FeatureExtractorInceptionV3=TorchFidelity),
    )
    path = tmp_path / "weights.pth"
    weights = {"fc.weight": torch.randn(2048, 3), "fc.bias": torch.randn(2048)}
    torch.save(weights, path)
    images = torch.from_numpy(pixels(4))
    expected = images.float().mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(Inception(path)(images), expected)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def download(url, dst, hash_prefix, progress):
        assert hash_prefix == "6726825d"
        torch.save(weights, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    torch.testing.assert_close(Inception()(images), expected)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    torch.testing.assert_close(Inception()(images), expected)  # from torch.hub's copy

    for bad in (weights | {"more": evil}, evil, [1.0], {"fc.bias": torch.zeros(2048)}):
        torch.save(bad, path)
        with pytest.raises(
            ValueError,
            match=rf"{path}: does not hold Inception's weights .*; fetch {url} and give it as "
            r"--detector",
        ):
            Inception(path)
    (tmp_path / "hub" / "checkpoints" / "weights-inception-6726825d.pth").unlink()

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        ValueError,
        match=rf"cannot be downloaded \(no network\); fetch {url} elsewhere and give it as "
        r"--detector",
    ):
        Inception()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    with pytest.raises(
        ImportError, match=r"fid needs torch-fidelity .*; run: pip install 'tdkern\[evaluation\]'"
    ):
        Inception(path)


def calculated(images, ref, num, *flags):
    """`tdkern fid calc` of a folder or a file."""
    return invoked("fid", "calc", "--images", images, "--ref", ref, "--num", num, *flags)


def test_ref_then_calc(tmp_path, stand_in):
    """A folder with subfolders as tdkern generate --subdirs writes them against a zip; grey images
    are RGB ones with equal channels.
    """
    images, others = pixels(30, (1, 8, 8)), pixels(21, (3, 8, 8), seed=1)
    for i, image in enumerate(torch.from_numpy(others)):
        (tmp_path / "images" / f"{i // 10 * 1000:06d}").mkdir(parents=True, exist_ok=True)
        save_image(tmp_path / "images" / f"{i // 10 * 1000:06d}" / f"{i:06d}.png", image)
    ref = tmp_path / "new" / "ref.npz"
    grey = data_set(tmp_path / "grey.zip", images)
    invoked("fid", "ref", "--data", grey, "--dest", ref, "--batch", "7")
    features = [
        StandIn()(torch.from_numpy(x).expand(-1, 3, -1, -1)).double().numpy()
        for x in (images, others)
    ]
    np.testing.assert_allclose(np.load(ref)["mu"], features[0].mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.load(ref)["sigma"], np.cov(features[0].T), rtol=1e-5, atol=1e-7)

    result = calculated(tmp_path / "images", ref, 21, "--batch", "4", "--workers", "0")
    expected = frechet_distance(*(Statistics(x.mean(0), np.cov(x.T)) for x in features))
    assert float(result.stdout) == pytest.approx(expected, rel=1e-4)
    assert (
        "Warning: the FID of 21 images is biased upwards" in result.stderr
        and f"FID of 21 images in {tmp_path / 'images'} against {ref}" in result.stderr
    )
    result = calculated(grey, ref, 30)
    assert abs(float(result.stdout)) < 1e-12 and "FID of 30 images (grey, as RGB)" in result.stderr
    some = [calculated(grey, ref, 29, "--seed", seed).stdout for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, stand_in):
    path, ref = data_set(tmp_path / "a.zip", pixels(3)), tmp_path / "ref.npz"
    write_statistics(ref, Statistics(np.zeros(6), np.eye(6)))

    def refused(*args):
        last = invoked("fid", *args, code=1).output.strip().splitlines()[-1]
        assert last.startswith("Error: "), last  # and no progress bar stands before it
        return last

    assert (
        refused("calc", "--images", path, "--ref", ref)
        == f"Error: {path}: holds 3 images, --num asks for 50000; generate more, or give --num 3"
    )
    assert "nowhere: no such folder or zip" in refused("calc", "--images", "nowhere", "--ref", ref)
    assert "nowhere.npz: not an .npz file" in refused(
        "calc", "--images", path, "--ref", "nowhere.npz", "--num", "2"
    )
    write_statistics(ref, golden("d8_full")[1])
    assert f"{ref}: must have the 6 features of inception-v3, got 8" in refused(
        "calc", "--images", path, "--ref", ref, "--num", "3"
    )
    assert "needs at least 2 images, got 1" in refused(
        "ref", "--data", data_set(tmp_path / "one.zip", pixels(1)), "--dest", tmp_path / "b.npz"
    )
    broken = tmp_path / "broken"
    data_set(broken, pixels(2))
    (broken / "00000" / "img00000001.png").write_bytes(b"no image")
    assert "img00000001.png is not a readable image" in refused(
        "ref", "--data", broken, "--dest", tmp_path / "b.npz", "--workers", "0"
    )
    with (
        pytest.raises(click.ClickException, match=r"^a\.zip: 1\.png cannot be read$"),
        one_line_errors(),
    ):
        # as DataLoader hands it on
        raise DatasetError("Caught in a worker process\nTraceback ...\na.zip: 1.png cannot be read")
    assert not (tmp_path / "b.npz").exists()
    assert (
        "is a directory" in invoked("fid", "ref", "--data", path, "--dest", tmp_path, code=2).output
    )
    assert "no network-snapshot-* in it" in refused("steps", "--network", "nowhere", "--ref", ref)


def drawn(folder, data, **changes):
    """A folder with a snapshot of a network for labelled data, and the statistics beside it."""
    options = Options(data=str(data), cond=True, arch="ddpmpp", cbase=4, cres=[1], **changes)
    trainer = Trainer(options, this_process())
    for parameter in trainer.ema.module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    meta = {"network": trainer.network, "classes": trainer.dataset.classes}
    write(folder, SNAPSHOT, 0, trainer.ema.module.state_dict(), meta)
    ref = folder / "ref.npz"
    invoked("fid", "ref", "--data", options.data, "--dest", ref, "--workers", "0")
    return folder, ref


@pytest.fixture
def drawn_network(tmp_path, stand_in, request):
    """A snapshot of a family's network in tmp_path, and the statistics beside it."""
    data = data_set(tmp_path / "a.zip", pixels(9), [i % 3 for i in range(9)])
    return drawn(tmp_path, data, family=request.param)


@pytest.mark.parametrize(
    "drawn_network, sampler, nfes",
    [
        ("edm", "heun", [3, 7]),
        ("edm", "dpmpp", [2, 4]),
        ("ct", "multistep", [2, 4]),
    ],
    indirect=["drawn_network"],
)
def test_steps_measures_what_generate_draws(drawn_network, sampler, nfes):
    network, ref = drawn_network
    flags = ["--network", network, "--sampler", sampler, "--batch", "3"]
    asked = ["--ref", ref, "--steps", "2,4", "--num", "8", "--seed", "5"]
    *table, line = invoked("fid", "steps", *flags, *asked).stdout.splitlines()
    measured = json.loads(line)
    expected = {"sampler": sampler, "num": 8, "seed": 5, "ref": str(ref)}
    assert {name: measured[name] for name in expected} == expected
    rows = measured["results"]
    assert [row["steps"] for row in rows] == [2, 4] and [row["nfe"] for row in rows] == nfes
    assert table[0].split() == ["steps", "NFE", "FID"]
    assert [[float(word) for word in row.split()] for row in table[1:]] == [
        [row["steps"], row["nfe"], round(row["fid"], 4)] for row in rows
    ]
    for row in rows:
        images = network / f"{sampler}{row['steps']}"
        drawn = ["--outdir", images, "--steps", row["steps"], "--seeds", "5-12"]
        invoked("generate", *flags, *drawn)
        files = calculated(images, ref, 8, "--batch", "3", "--workers", "0").stdout
        assert float(files) == pytest.approx(row["fid"], rel=1e-5)
    assert rows[0]["fid"] != pytest.approx(rows[1]["fid"], rel=1e-3)


@pytest.mark.parametrize("drawn_network", ["edm"], indirect=True)
def test_one_step_is_too_few_for_heun(drawn_network):
    network, ref = drawn_network
    few = ["fid", "steps", "--network", network, "--ref", ref, "--steps", "4,1", "--num", "8"]
    assert "--steps must be at least 2 each with heun, got 1" in invoked(*few, code=2).output


@pytest.mark.parametrize("drawn_network", ["ct"], indirect=True)
def test_a_consistency_model_draws_in_one_step_or_with_steps_in_several(drawn_network):
    network, ref = drawn_network
    few = ["fid", "steps", "--network", network, "--ref", ref, "--steps", "4,1", "--num", "8"]
    one_step = json.loads(invoked(*few).stdout.splitlines()[-1])["results"][1]
    invoked("generate", "--network", network, "--outdir", network / "one", "--seeds", "0-7")
    files = calculated(network / "one", ref, 8, "--workers", "0").stdout
    assert float(files) == pytest.approx(one_step["fid"], rel=1e-5)

    folders = {"default": (), "asked": ("--sampler", "multistep")}
    flags = ["--network", network, "--steps", "2", "--seeds", "5-12", "--batch", "3"]
    for name, sampler in folders.items():
        invoked("generate", *flags, "--outdir", network / name, *sampler)
    default, asked = (
        [path.read_bytes() for path in sorted((network / name).glob("*.png"))] for name in folders
    )
    assert len(default) == 8 and default == asked


@pytest.mark.parametrize("drawn_network", ["edm"], indirect=True)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_steps_of_images_that_are_not_finite_are_refused(drawn_network, value):
    network, ref = drawn_network
    poison(network, float(value))
    result = invoked(
        "fid", "steps", "--network", network, "--ref", ref, "--steps", "3", "--num", "8", code=1
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and "not finite from the sampler's step 1 of 3" in last
    assert result.stdout == ""  # no distance of black images


def test_steps_draws_only_classes_that_have_images(tmp_path, stand_in, monkeypatch):
    network, ref = drawn(tmp_path, DATA / "faults" / "labels_1_to_3.zip")
    seen, real = set(), cli.load_network

    def load_network(*args):
        net, meta = real(*args)
        net.register_forward_pre_hook(
            lambda _, args, given: seen.update(classes_of(given)), with_kwargs=True
        )
        return net, meta

    def classes_of(given):
        return given["class_labels"].argmax(1).tolist()

    monkeypatch.setattr(cli, "load_network", load_network)
    few = ["--steps", "2", "--num", "32", "--seed", "7"]
    invoked("fid", "steps", "--network", network, "--ref", ref, *few)
    assert seen == {1, 2, 3}


def test_steps_of_vector_labels_are_refused(tmp_path, stand_in):
    network, ref = drawn(tmp_path, DATA / "faults" / "labels_vector.zip")
    few = ["--steps", "2", "--num", "8"]
    output = invoked("fid", "steps", "--network", network, "--ref", ref, *few, code=1).output
    assert "labels are vectors and no classes" in output.strip().splitlines()[-1]


def test_steps_shares_the_seeds_among_processes(tmp_path, stand_in, monkeypatch):
    drawn, ref, net = [], tmp_path / "ref.npz", EDMPrecond(MLP())
    write_statistics(ref, Statistics(np.zeros(6), np.eye(6)))

    def sample(net, network, seeds, sigmas, sampler):
        drawn.append(seeds)
        return torch.from_numpy(pixels(len(seeds)))

    monkeypatch.setattr(cli, "load_network", lambda *_: (net, {"network": {"img_channels": 3}}))
    monkeypatch.setattr(cli, "sample", sample)
    for rank, shares in enumerate(([[0, 1], [4]], [[2, 3]])):
        monkeypatch.setattr(
            cli, "joined", lambda rank=rank: nullcontext(Process(rank, 2, torch.device("cpu")))
        )
        output = invoked(
            "fid",
            "steps",
            "--network",
            "a",
            "--ref",
            ref,
            "--steps",
            "2,3",
            "--num",
            "5",
            "--batch",
            "2",
        ).output
        assert drawn == 2 * shares and bool(output) == (rank == 0)  # the first alone prints
        drawn.clear()


def _rank(rank, args):
    """One of two processes."""
    cli.make_detector = StandIn
    main(args, standalone_mode=False)


def test_two_processes_share_the_images(tmp_path, stand_in):
    """Also where the second has none: one batch."""
    data = data_set(tmp_path / "a.zip", pixels(11))
    for batch in ("3", "11"):
        args = [
            "fid",
            "ref",
            "--data",
            str(data),
            "--batch",
            batch,
            "--workers",
            "0",
            "--dest",
            str(tmp_path / batch),
        ]
        in_two_processes(_rank, args)
        two = read_statistics(args[-1])
        invoked(*args)
        for ours, theirs in zip(read_statistics(args[-1])[:2], two[:2], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
