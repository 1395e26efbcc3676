"""EDM's augmentation: against golden numbers, and each transform alone against what it means."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from helpers import golden_of
from tdkern.data import AugmentPipe
from tdkern.data.augment import resample

EDM = {"xflip": 1e8, "yflip": 1, "scale": 1, "rotate_frac": 1, "aniso": 1, "translate_frac": 1}
# Pixels where the reference, which pads by what its batch needs, cuts the filter's last taps; ours
# does not.
CUT = {
    "augment_edm_p1": {(3, 15, 0), (3, 15, 15)},
    "augment_edm_p05": {(4, 0, 0)},
    "augment_flips": set(),
}


def golden(name):
    data = golden_of(name)
    draws = {key[5:]: draw.squeeze() for key, draw in data.items() if key.startswith("draw_")}
    return data, draws


@pytest.mark.parametrize("name", CUT)
def test_golden(name):
    data, draws = golden(name)
    kwargs = {"xflip": 1e8, "yflip": 1} if name == "augment_flips" else EDM
    pipe = AugmentPipe(p=data["p"].item(), **kwargs)
    images, labels = pipe(data["in_x"].double(), draws)
    error = (images - data["out_x"]).abs().amax(1)
    assert {tuple(place) for place in (error > 1e-12).nonzero().tolist()} == CUT[name]
    assert error.max() < 5e-7
    assert pipe.label_dim == labels.shape[1] == data["out_labels"].shape[1]
    torch.testing.assert_close(labels, data["out_labels"].double(), atol=1e-7, rtol=0)

    single, _ = pipe(data["in_x"], draws)
    assert single.dtype == torch.float32 and (single - data["out_x"]).abs().max() < 2e-5


def needed(linear, shift, size):
    """How far beyond the left, right, upper and lower edge a batch's transforms read: to its
    farthest corner, and 6 pixels more for the filters.
    """
    half = (size - 1) / 2
    corners = half * torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    points = (corners - shift[:, None]) @ linear.mT
    low, high = points.amin(1), points.amax(1)  # [B, 2]
    far = torch.stack([-low[:, 0], high[:, 0], -low[:, 1], high[:, 1]], 1) - half + 6
    return far.clamp(0, size - 1).ceil().int()  # [B, 4]


def cut_off(images, linear, shift, taps, margins):
    """What is lost of `resample` where images are black beyond so many reflected pixels at each
    edge.
    """
    room, results = images.shape[-1], []
    for own in ([images.shape[-1] - 1] * 4, margins):
        x = F.pad(images, own, mode="reflect")
        x = F.pad(x, [room - margin for margin in own])
        results.append(resample(x, linear, shift, taps)[..., room:-room, room:-room])
    return results[0] - results[1]


@pytest.mark.parametrize("name", ["augment_edm_p1", "augment_edm_p05"])
def test_a_padding_by_what_the_batch_needs_is_the_references(name):
    """To the pixels whose last taps it cuts."""
    data, draws = golden(name)
    draws = {key: draw.double() for key, draw in draws.items()}
    pipe, images = AugmentPipe(p=data["p"].item(), **EDM), data["in_x"].double()
    only_flips = {key: draw for key, draw in draws.items() if "flip" in key}
    flipped, _ = AugmentPipe(p=pipe.p, xflip=1e8, yflip=1)(images, only_flips)
    linear, shift, _ = pipe._transform(flipped, draws)
    margins = needed(linear, shift, images.shape[-1]).amax(0).tolist()
    lost = cut_off(flipped, linear, shift, pipe.taps.double(), margins)
    assert lost.abs().max() > 1e-8
    expected = data["out_x"].double()
    torch.testing.assert_close(pipe(images, draws)[0] - lost, expected, atol=1e-12, rtol=0)


def worst_of_a_batch(pipe, size):
    """What the images that set a batch's padding lose by it, where, and the most that one in
    [-1, 1] can lose in the worst of these pixels.
    """
    images = torch.zeros(16, 1, size, size, dtype=torch.float64)
    linear, shift, _ = pipe._transform(images, pipe.draw(images))
    own = needed(linear, shift, size)
    setting = own.argmax(0).unique()
    another = next(i for i in range(16) if i not in setting)
    rows = torch.cat([setting, torch.tensor([another])])
    noise = (2 * torch.rand_like(images[rows]) - 1).requires_grad_()
    given = linear[rows], shift[rows], pipe.taps.double()
    lost = cut_off(noise, *given, own.amax(0).tolist())
    (weights,) = torch.autograd.grad(lost.flatten()[lost.abs().argmax()], noise)
    lost = lost.detach().abs()[:, 0]
    assert lost[-1].max() < 1e-12  # another image loses nothing
    return lost.max().item(), (lost > 1e-12).nonzero()[:, 1:], weights.abs().sum().item()


@pytest.mark.parametrize("seed", [1314, 1405, 1473, 1, 2])
def test_the_docstrings_numbers_of_the_difference_to_ada_hold(seed):
    """The first seeds are the worst of 500."""
    noise, any_image = map(float, re.findall(r"\d\S*e-\d+", resample.__doc__))
    torch.manual_seed(seed)
    pipe, size = AugmentPipe(**EDM), 32
    worst, places, most = worst_of_a_batch(pipe, size)
    assert ((places < 2) | (places >= size - 2)).any(1).all()
    assert worst <= noise and most <= any_image
    if seed > 1000:
        assert worst > noise / 10 and most > any_image / 10


SIZE = 32


def scene(x, y):
    """A smooth image with a value at every real point, in pixels from the centre."""
    x, y = x * (2 * math.pi / SIZE), y * (2 * math.pi / SIZE)
    return torch.stack([(x + 0.5).sin() * (0.7 * y).cos(), (0.6 * x - 0.8 * y + 0.3).sin()])


def pixels():
    c = torch.arange(SIZE, dtype=torch.float64) - (SIZE - 1) / 2
    return c[None, :].expand(SIZE, SIZE), c[:, None].expand(SIZE, SIZE)


def one(name, **draws):
    """One transform, with `draws`, of the scene: the image's inside and its labels."""
    pipe = AugmentPipe(**{name: 1})
    images, labels = pipe(
        scene(*pixels())[None],
        {key: torch.tensor([value], dtype=torch.float64) for key, value in draws.items()},
    )
    assert labels.shape == (1, pipe.label_dim)
    return images[0, :, 8:-8, 8:-8], labels[0].tolist()


def shows(image, x, y):
    """Whether an image's inside is the scene's at (x, y), to a tenth of a pixel: the filter's phase
    is off by half of that, which a turn doubles.
    """
    return (image - scene(x, y)[:, 8:-8, 8:-8]).abs().max() < 0.025


def test_flips_alone():
    x, y = pixels()
    assert torch.equal(
        one("xflip", xflip_choice=1.0, xflip_gate=0.3)[0], scene(-x, y)[:, 8:-8, 8:-8]
    )
    assert torch.equal(
        one("yflip", yflip_choice=1.0, yflip_gate=0.3)[0], scene(x, -y)[:, 8:-8, 8:-8]
    )
    assert one("xflip", xflip_choice=1.0, xflip_gate=0.3)[1] == [1]
    assert torch.equal(
        one("yflip", yflip_choice=0.0, yflip_gate=0.3)[0], scene(x, y)[:, 8:-8, 8:-8]
    )


def test_scale_alone():
    x, y = pixels()
    for w in (-1.5, 2.0):  # smaller, larger
        image, labels = one("scale", scale_normal=w, scale_gate=0.0)
        assert shows(image, x / 2 ** (0.2 * w), y / 2 ** (0.2 * w)) and not shows(image, x, y)
        assert labels == [w]


def test_rotation_alone():
    x, y = pixels()
    for u in (0.1, 0.5, 0.6, 0.9):
        r = (2 * u - 1) * math.pi
        image, labels = one("rotate_frac", rotate_uniform=u, rotate_gate=0.0)
        assert shows(image, math.cos(r) * x - math.sin(r) * y, math.sin(r) * x + math.cos(r) * y)
        assert labels == pytest.approx([math.cos(r) - 1, math.sin(r)])
    # a quarter turn counter-clockwise: what was on the right is on top
    image, _ = one("rotate_frac", rotate_uniform=0.75, rotate_gate=0.0)
    assert (image - scene(*pixels()).rot90(1, (1, 2))[:, 8:-8, 8:-8]).abs().max() < 0.025


def test_aniso_alone():
    x, y = pixels()
    image, labels = one(
        "aniso", aniso_normal=1.5, aniso_angle_uniform=0.6, aniso_gate=0.0, aniso_angle_gate=0.9
    )
    assert shows(image, x / 2**0.3, y * 2**0.3) and labels == [1.5, 0]
    # turned by a quarter, it stretches along y
    image, labels = one(
        "aniso", aniso_normal=1.5, aniso_angle_uniform=0.75, aniso_gate=0.0, aniso_angle_gate=0.4
    )
    assert shows(image, x * 2**0.3, y / 2**0.3) and labels == pytest.approx([0, 1.5])


def test_translation_alone_by_whole_pixels_is_exact():
    """The filter is orthogonal: up and down again gives the image back. Outside it is the mirror
    image, without the edge twice.
    """
    pipe = AugmentPipe(translate_frac=1)
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    # times 16 / 8
    moved, labels = pipe(
        image, {"translate_normal": torch.tensor([[2.5], [-1.0]]), "translate_gate": torch.zeros(1)}
    )
    wide = torch.nn.functional.pad(image, [5, 0, 0, 2], mode="reflect")
    torch.testing.assert_close(moved, wide[:, :, 2:, :16], atol=1e-6, rtol=0)
    assert labels.tolist() == [[2.5, -1.0]]


def test_order_of_the_transforms():
    """Scaled, then turned, then stretched, then moved would be another order: the golden images
    have them the other way round.
    """
    x, y = pixels()
    pipe = AugmentPipe(scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    zero = torch.zeros(1)
    image, _ = pipe(
        scene(x, y)[None],
        {
            "scale_normal": zero,
            "scale_gate": zero,
            "rotate_uniform": zero + 0.6,
            "rotate_gate": zero,
            "aniso_normal": zero + 1,
            "aniso_angle_uniform": zero,
            "aniso_gate": zero,
            "aniso_angle_gate": zero + 0.9,
            "translate_normal": torch.tensor([[0.5], [0.0]]),
            "translate_gate": zero,
        },
    )
    r, x = 0.2 * math.pi, x - 0.5 * SIZE / 8
    x, y = x / 2**0.2, y * 2**0.2
    assert shows(
        image[0, :, 8:-8, 8:-8],
        math.cos(r) * x - math.sin(r) * y,
        math.sin(r) * x + math.cos(r) * y,
    )


def test_nothing_to_do_gives_the_images_back():
    images = torch.randn(4, 3, 8, 8)
    same, labels = AugmentPipe()(images)
    assert torch.equal(same, images) and labels.shape == (4, 0)
    same, labels = AugmentPipe(p=0, **EDM)(images)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    assert not labels.any() and labels.shape == (4, 9)


def test_probabilities_and_distributions():
    torch.manual_seed(0)
    n = 4000
    _, labels = AugmentPipe(p=0.3, **EDM)(torch.zeros(n, 1, 2, 2))
    assert abs(labels[:, 0].mean() - 0.5) < 0.04  # xflip always applies, and then to half
    assert abs(labels[:, 1].mean() - 0.15) < 0.03
    applied = (labels[:, [2, 3, 5, 7]] != 0).float().mean(0)
    assert (applied - 0.3).abs().max() < 0.04
    for column in (2, 7, 8):
        normal = labels[labels[:, column] != 0, column]
        assert abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1
    turned = labels[:, 3] != 0
    angle = torch.atan2(labels[turned, 4], labels[turned, 3] + 1)
    assert abs(angle.mean()) < 0.2 and abs(angle.std() - math.pi / 3**0.5) < 0.1
    stretched = labels[:, 5] != 0
    assert abs((labels[stretched, 6] == 0).float().mean() - 0.5) < 0.06  # half along the axes
    # gates are independent
    assert (turned & stretched).float().mean() == pytest.approx(0.09, abs=0.03)


def test_draws_come_from_the_global_generator():
    pipe, images = AugmentPipe(p=0.5, **EDM), torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    first = pipe(images)
    torch.manual_seed(1)
    again = pipe(images, pipe.draw(images))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(pipe(images)[0], first[0])


def test_images_do_not_depend_on_their_batch():
    data, draws = golden("augment_edm_p1")
    pipe = AugmentPipe(**EDM)
    whole, _ = pipe(data["in_x"].double(), draws)
    part, _ = pipe(
        data["in_x"][2:4].double(), {name: draw[..., 2:4] for name, draw in draws.items()}
    )
    torch.testing.assert_close(part, whole[2:4], atol=1e-13, rtol=0)


def test_no_value_reaches_the_host():
    """The meta device has no values: anything that waits for one, or whose shape depends on one,
    raises there.
    """
    images, labels = AugmentPipe(p=0.12, **EDM).to("meta")(torch.empty(5, 3, 16, 16, device="meta"))
    assert images.shape == (5, 3, 16, 16) and labels.shape == (5, 9)


def test_gradient():
    pipe = AugmentPipe(**EDM)
    images = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    draws = pipe.draw(images)
    assert torch.autograd.gradcheck(lambda x: pipe(x, draws)[0], images, fast_mode=True)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: AugmentPipe(p=-1), "AugmentPipe: p must be a number >= 0, got -1"),
        (
            lambda: AugmentPipe(scale=float("nan")),
            "AugmentPipe: scale must be a number >= 0, got nan",
        ),
        (
            lambda: AugmentPipe()(torch.zeros(1, 3, 8, 4)),
            r"AugmentPipe: images must be \[B, C, R, R\] of float32 or float64, got \[1, 3, 8, "
            r"4\] of torch.float32",
        ),
        (lambda: AugmentPipe()(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "of torch.uint8"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
