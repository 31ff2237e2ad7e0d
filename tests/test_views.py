"""Views: their numbers by distribution and row by row; their pixels against torchvision and against loops."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

import data
from data import (BRIGHTNESS, CONTRAST, HUE, ORDERS, SATURATION, ContrastViews, Draws, FineTuneTransform, MultiCrop,
                  blur_matrix, colour_jitter, erasing_noise, grey, inside, normalize, resize_matrix)

HALF = (0.5,) * 3


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seen(views, images, seed=0, **more):
    """What a network sees of images, by the numbers that a worker draws for them."""
    return views(images, views.draw(uniforms(len(images), views.uniforms, seed=seed)), **more)


def noise_images(n=6, size=(64, 32)):
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


ALL_VIEWS = {"fine-tuning": FineTuneTransform((64, 32), HALF, HALF), "two crops": MultiCrop((64, 32), num_local=0),
             "five crops": MultiCrop((64, 32), num_local=3), "contrast": ContrastViews((64, 32)),
             "contrast alone": ContrastViews((64, 32), original=False, stripes=0)}


# ---- draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ALL_VIEWS.values(), ids=ALL_VIEWS)
def test_numbers_of_an_image_are_of_its_own_row(views, monkeypatch):
    """... bit for bit, whatever other rows are drawn with it; and the row is used up."""
    made, rows = [], uniforms(9, views.uniforms)
    monkeypatch.setattr(data, "Draws", lambda u: made.append(Draws(u)) or made[-1])
    whole = views.draw(rows)
    assert made and all(draws.used == draws.uniforms.shape[-1] for draws in made)
    for part in (1, 2, 4):
        assert torch.equal(torch.cat([views.draw(few) for few in rows.split(part)]), whole)
    assert torch.equal(views.draw(rows.flip(0)), whole.flip(0)) and len(whole.flatten(1).unique(dim=0)) == 9


def test_a_row_is_used_up_from_left_to_right():
    draws = Draws(torch.arange(12.0).view(2, 6) / 12)
    torch.testing.assert_close(draws.uniform(0, 12, 2), torch.tensor([[0.0, 1.0], [6.0, 7.0]]))
    assert draws.chance(0.25).tolist() == draws.chance(torch.tensor([0.5, 0.75])).tolist() == [True, False]
    low = torch.tensor([0.0, 12.0])
    torch.testing.assert_close(draws.uniform(low, 12, 2), torch.tensor([[4.0, 12.0], [10.0, 12.0]]))
    with pytest.raises(AssertionError, match="more numbers than a row has"):
        draws.uniform(0, 1, 1)


# ---- augmentation of fine-tuning -------------------------------------------------------------


def test_flip_and_crop_equal_the_loop():
    images = noise_images(6, (12, 7))
    flip, top, left = torch.tensor([0, 1, 0, 1, 1, 0]).bool(), torch.tensor([0, 20, 3, 10, 7, 10]), \
        torch.tensor([20, 0, 5, 10, 11, 10])
    numbers = torch.cat([torch.stack([flip, top, left], dim=1).float(), torch.zeros(6, 4)], dim=1)
    out = FineTuneTransform((12, 7), (0.0,) * 3, (1 / 255,) * 3, noise=False)(images, numbers).round()
    for i in range(6):
        image = images[i].flip(-1) if flip[i] else images[i]
        padded = torch.nn.functional.pad(image, [10] * 4)
        assert torch.equal(out[i], padded[:, top[i]:top[i] + 12, left[i]:left[i] + 7])
    assert torch.equal(out[5], images[5])                     # the centre crop undoes the padding


def test_places_of_crops_and_flips_are_drawn_evenly():
    numbers = FineTuneTransform((64, 32), HALF, HALF).draw(uniforms(20_000, 26))
    flip, top, left = numbers[:, :3].T
    assert abs(flip.mean() - 0.5) < 0.02 and set(flip.tolist()) == {0, 1}
    for place in (top, left):
        counts = torch.bincount(place.long(), minlength=21)
        assert torch.equal(place, place.floor()) and len(counts) == 21 and 800 < counts.min() and counts.max() < 1100


def test_normalize_equals_torchvision():
    from torchvision.transforms.functional import normalize as reference
    x = noise_images(2, (5, 4))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(normalize(x, mean, std), reference(x.float() / 255, mean, std))
    assert normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), HALF, HALF).unique() == -1


def test_random_erasing_distribution():
    H, W, n = 64, 32, 6000
    mask = inside(Draws(uniforms(n, 23, seed=3)).erasures(H, W, (0.02, 1 / 3)), H, W)[:, 0]
    erased = mask.flatten(1).any(1)
    assert abs(erased.float().mean() - 0.5) < 0.02
    rows, columns = mask.any(2).sum(1)[erased], mask.any(1).sum(1)[erased]
    assert torch.equal(rows * columns, mask[erased].flatten(1).sum(1))    # a full rectangle, nothing else
    assert rows.max() < H and columns.max() < W
    share = rows * columns / (H * W)
    assert 0.015 < share.min() < 0.03 and 0.31 < share.max() < 0.345     # 2 % to 1/3, up to rounding
    reference = timm_erasing(H, W, 6000)
    assert abs(share.mean() - reference.mean()) < 0.006 and abs(share.std() - reference.std()) < 0.006
    hit = mask[erased].float().mean(0)
    assert (hit - hit.flip(0)).abs().max() < 0.05 and (hit - hit.flip(1)).abs().max() < 0.05  # no side preferred


def timm_erasing(H, W, n):
    """Erased share of images by the words of the recipe, one image at a time."""
    rng, shares = np.random.default_rng(0), []
    while len(shares) < n:
        for _ in range(10):
            area, aspect = rng.uniform(0.02, 1 / 3) * H * W, np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h < H and w < W:
                shares.append(h * w / (H * W))
                break
    return np.array(shares)


@pytest.mark.parametrize("noise", [True, False])
def test_erased_pixels_get_noise_shared_by_processes_or_the_mean(noise):
    images, one = noise_images(8, (32, 16)), FineTuneTransform((32, 16), HALF, HALF, noise=noise)
    numbers = one.draw(uniforms(8, 26))
    shared = [erasing_noise(images[:8 // n], 5, 7, rank, n) for n in (1, 2, 4) for rank in range(n)]
    filled = shared[0] if noise else None
    out = one(images, numbers, filled)
    assert out.shape == images.shape and out.dtype == torch.float32
    erased = inside(numbers[:, 3:], 32, 16).expand(-1, 3, -1, -1)
    nothing_erased = torch.cat([numbers[:, :3], torch.zeros(8, 4)], dim=1)
    plain = FineTuneTransform((32, 16), HALF, HALF, noise=False)(images, nothing_erased)
    assert torch.equal(out[~erased], plain[~erased]) and erased.any()
    assert torch.equal(out[erased], (filled if noise else torch.zeros_like(out))[erased])
    for part in (shared[1:3], shared[3:]):                    # 2 or 4 processes draw as one does
        assert torch.equal(torch.cat(part), shared[0])
    assert shared[0].mean().abs() < 0.05 and 0.95 < shared[0].std() < 1.05
    assert not torch.equal(erasing_noise(images, 5, 8, 0, 1), shared[0])
    outside = out.abs() > 1.001                               # only noise leaves the range of pixels
    assert outside.any() == noise


# ---- pixels of views -------------------------------------------------------------------------


@pytest.mark.parametrize("box, size", [((3, 2, 40, 20), (64, 32)), ((0, 0, 64, 32), (32, 16)),
                                       ((10, 5, 7, 9), (32, 16)), ((1, 0, 60, 31), (20, 9)),
                                       ((0, 0, 64, 32), (64, 32))])
def test_resize_equals_torchvision(box, size):
    x, (top, left, h, w) = uniforms(2, 3, 64, 32), box
    rows = resize_matrix(torch.full((2,), float(top)), torch.full((2,), float(h)), 64, size[0])
    flip = torch.tensor([False, True])
    columns = resize_matrix(torch.full((2,), float(left)), torch.full((2,), float(w)), 32, size[1], flip)
    wanted = TF.resize(x[:, :, top:top + h, left:left + w], size, InterpolationMode.BICUBIC, antialias=True).clone()
    wanted[1] = wanted[1].flip(-1)
    torch.testing.assert_close(rows[:, None] @ x @ columns[:, None].mT, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(sigma):
    x = uniforms(2, 3, 40, 20)
    rows, columns = blur_matrix(torch.full((2,), sigma), 40), blur_matrix(torch.full((2,), sigma), 20)
    torch.testing.assert_close(rows[:, None] @ x @ columns[:, None].mT, TF.gaussian_blur(x, [13, 13], [sigma] * 2),
                               rtol=1e-5, atol=1e-5)
    assert torch.equal(blur_matrix(torch.tensor([0.01]), 9)[0], torch.eye(9))


REFERENCE = {BRIGHTNESS: TF.adjust_brightness, CONTRAST: TF.adjust_contrast, SATURATION: TF.adjust_saturation,
             HUE: TF.adjust_hue}


def one_change(which, value, n=2):
    """Numbers of `colour_jitter` for one change alone."""
    kinds, factors, turn = torch.full((n, 6), -1), torch.ones(n, 6), torch.zeros(n, 1)
    if which == HUE:
        turn[:] = value
    else:
        kinds[:, which], factors[:, which] = which, value
    return torch.cat([kinds, factors, turn], dim=1)


@pytest.mark.parametrize("which, value", [(BRIGHTNESS, 1.3), (CONTRAST, 0.7), (SATURATION, 1.4), (HUE, 0.1),
                                          (HUE, -0.07)])
def test_colour_changes_equal_torchvision(which, value):
    x = uniforms(2, 3, 9, 7)
    x[0, :, 0] = 0.5                                            # grey pixels have no hue
    out = colour_jitter(x, one_change(which, value))
    torch.testing.assert_close(out, REFERENCE[which](x, value), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(colour_jitter(x, one_change(HUE, 0.0)), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grey(x), TF.rgb_to_grayscale(x), rtol=1e-3, atol=1e-3)


def test_colours_change_in_the_order_that_was_drawn():
    """One batch with every order of the four: each image is what torchvision makes of it, one change after another."""
    strengths, rows = (0.4, 0.4, 0.2, 0.1), uniforms(4 * len(ORDERS), 6)
    rows[:, 4] = 0                                              # the chance: all are changed
    rows[:, 5] = (torch.arange(len(rows)) % len(ORDERS) + 0.5) / len(ORDERS)
    x = uniforms(len(rows), 3, 9, 7, seed=1)
    out = colour_jitter(x, Draws(rows).colours(strengths, 0.8))
    assert len({tuple(order) for order in ORDERS.tolist()}) == 24
    for i, row in enumerate(rows.tolist()):
        wanted = x[i]
        for which in ORDERS[i % 24].tolist():
            change = (2 * row[which] - 1) * strengths[which]
            wanted = REFERENCE[which](wanted, change if which == HUE else 1 + change)
        torch.testing.assert_close(out[i], wanted, rtol=1e-4, atol=2e-4)


def test_colours_are_drawn_as_the_recipe_says():
    numbers = Draws(uniforms(30_000, 6)).colours((0.4, 0.4, 0.2, 0.1), 0.8)
    kinds, factors, turn = numbers[:, :6].long(), numbers[:, 6:12], numbers[:, 12]
    assert torch.equal(kinds.sort(1).values, torch.tensor([-1, -1, -1, 0, 1, 2]).expand(30_000, 6))
    plain = (factors == 1).all(1) & (turn == 0)
    assert abs(plain.float().mean() - 0.2) < 0.01
    for which, strength in ((BRIGHTNESS, 0.4), (CONTRAST, 0.4), (SATURATION, 0.2)):
        drawn = factors[kinds == which][~plain]
        assert 1 - strength <= drawn.min() < 1 - 0.99 * strength and 1 + 0.99 * strength < drawn.max() <= 1 + strength
        assert drawn.mean() == pytest.approx(1, abs=0.01)
        assert drawn.std() == pytest.approx(strength / 3 ** 0.5, rel=0.02)
    assert -0.1 <= turn.min() < -0.099 and 0.099 < turn.max() <= 0.1
    before = (kinds[:, :3] >= 0).sum(1)                         # blends before the turn: 0 to 3, each as often
    assert (torch.bincount(before) / len(before) - 0.25).abs().max() < 0.01
    counts = kinds.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and 1100 < counts.min() and counts.max() < 1400


# ---- views of PersonViT ----------------------------------------------------------------------


def test_crops_have_the_areas_and_aspects_of_the_recipe():
    for scale in ((0.4, 1.0), (0.05, 0.8)):
        rows = uniforms(20_000, 22, seed=1)
        boxes, found = Draws(rows).rectangles(256, 128, scale, (1 / 0.667, 1 / 0.375), whole=True)
        top, left, h, w = boxes.unbind(1)
        assert torch.equal(Draws(rows).crops(256, 128, scale, (0.375, 0.667))[found], boxes[found])
        area, aspect = h * w / (256 * 128), w / h
        assert found.float().mean() > 0.98
        area, aspect = area[found], aspect[found]
        assert scale[0] - 0.01 < area.min() and area.max() < scale[1] + 0.01
        assert 0.36 < aspect.min() and aspect.max() < 0.69
        assert (top >= 0).all() and (top + h <= 256)[found].all() and (left + w <= 128)[found].all()
        reference = torchvision_crops(scale, 4000)
        assert abs(area.mean() - reference[:, 0].mean()) < 0.012
        assert abs(aspect.mean() - reference[:, 1].mean()) < 0.006


def torchvision_crops(scale, n, aspect=(0.375, 0.667)):
    """Area and aspect of torchvision's RandomResizedCrop on a 256 x 128 image."""
    from torchvision.transforms import RandomResizedCrop
    torch.manual_seed(0)
    image = torch.zeros(1, 256, 128)
    boxes = [RandomResizedCrop.get_params(image, scale, aspect) for _ in range(n)]
    return np.array([(h * w / (256 * 128), w / h) for _, _, h, w in boxes])


def test_rates_of_flip_colour_grey_blur_and_solarisation():
    """Each image is a function of its draws; rates are counted over the views of many flat or simple images."""
    n, (H, W) = 3000, (32, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    views = MultiCrop((H, W), num_local=0)
    colour = torch.tensor([200, 90, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(n, 3, H, W)
    first = seen(views, colour)["globals"][0] * std + mean
    is_grey = (first.amax(1) - first.amin(1)).flatten(1).amax(1) < 1e-3
    assert abs(is_grey.float().mean() - 0.2) < 0.03
    same = (first - colour.float() / 255).abs().flatten(1).amax(1) < 1e-3
    assert abs(same.float().mean() - 0.2 * 0.8) < 0.03           # neither jitter (0.8) nor grey (0.2)
    flat = torch.full((n, 3, H, W), 128, dtype=torch.uint8)
    level = (seen(views, flat)["globals"][0] * std + mean).mean((1, 2, 3)) / (128 / 255)
    assert 0.6 <= level.min() < 0.61 and 1.39 < level.max() <= 1.4 and level.mean() == pytest.approx(1, abs=0.02)
    assert abs((level.sub(1).abs() < 1e-4).float().mean() - 0.2) < 0.03  # brightness U(0.6, 1.4), for 0.8 of them
    ramp = (torch.arange(W) * 16).to(torch.uint8).expand(n, 3, H, W)
    first = seen(views, ramp, 1)["globals"][0]
    flipped = first[..., 0].mean((1, 2)) > first[..., -1].mean((1, 2))
    assert abs(flipped.float().mean() - 0.5) < 0.04
    bright = torch.full((n, 3, H, W), 255, dtype=torch.uint8)    # white, solarised, is black
    first, second = (v * std + mean for v in seen(views, bright, 2)["globals"])
    dark = second.amax((1, 2, 3)) < 0.45                         # brightness leaves 0.6 at least
    assert first.amin() > 0.55 and abs(dark.float().mean() - 0.2) < 0.03
    board = (255 * ((torch.arange(H)[:, None] // 2 + torch.arange(W) // 2) % 2)).to(torch.uint8).expand(n, 3, H, W)
    views = MultiCrop((H, W), num_local=0, global_scale=(0.999, 1), aspect=(0.4999, 0.5001))
    crops = [v * std + mean for v in seen(views, board, 3)["globals"]]
    soft = [(v.std((1, 2, 3)) / v.mean((1, 2, 3)) < 0.6).float().mean() for v in crops]
    assert soft[0] > soft[1] + 0.3                               # blur: always on the first, 0.1 on the second


def test_views_of_an_image_are_functions_of_its_numbers():
    images, views = noise_images(), MultiCrop((64, 32), num_local=3)
    one = seen(views, images, 5)
    assert one["globals"].shape == (2, 6, 3, 64, 32) and one["locals"].shape == (3, 6, 3, 32, 16)
    again = seen(views, images, 5)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["globals"], seen(views, images, 6)["globals"])
    numbers = views.draw(uniforms(6, views.uniforms, seed=5))
    halves = [views(images[part], numbers[part]) for part in (slice(3), slice(3, 6))]
    for key in one:
        torch.testing.assert_close(torch.cat([h[key] for h in halves], dim=1), one[key], rtol=1e-5, atol=1e-5)
    assert len(seen(MultiCrop((64, 32), num_local=0), images)["locals"]) == 0
    assert math.isfinite(one["locals"].sum())
    twice = seen(views, images[:1].repeat(2, 1, 1, 1))           # a sampler may repeat an image in a batch
    assert not torch.equal(twice["globals"][:, 0], twice["globals"][:, 1])


def test_a_crop_that_fits_nowhere_is_the_whole_image():
    boxes = Draws(uniforms(50, 22)).crops(64, 32, (1.0, 1.0), (3.0, 4.0))  # as large as the image, yet far wider
    assert torch.equal(boxes, torch.tensor([0.0, 0, 64, 32]).expand(50, 4))


# ---- views of UP-ReID ------------------------------------------------------------------------

LUP = [torch.tensor(v).view(3, 1, 1) for v in (data.LUP_MEAN, data.LUP_STD)]


def test_original_is_normalised_and_nothing_else():
    images = noise_images(3, (32, 16))
    views = seen(ContrastViews((32, 16)), images)
    torch.testing.assert_close(views["original"], (images / 255 - LUP[0]) / LUP[1])
    assert set(seen(ContrastViews((32, 16), original=False, stripes=0), images)) == {"first", "second"}


def test_stripes_of_both_augmentations_show_the_same_region():
    """Four stripes of four grey levels: whatever is not erased keeps the level of its stripe."""
    levels = torch.tensor([40, 100, 160, 220], dtype=torch.uint8).repeat_interleave(16)
    images = levels.view(1, 1, 64, 1).expand(50, 3, 64, 32).contiguous()
    views = seen(ContrastViews((64, 32)), images)
    for name in ("stripes1", "stripes2"):
        stripes = views[name]
        assert stripes.shape == (50, 4, 3, 16, 32)
        pixels = stripes * LUP[1] + LUP[0]
        for m, level in enumerate((40, 100, 160, 220)):
            kept = (stripes[:, m] != 0).all(1, keepdim=True).expand(-1, 3, -1, -1)
            wanted = torch.full((int(kept.sum()),), level / 255)
            torch.testing.assert_close(pixels[:, m][kept], wanted, rtol=1e-3, atol=1e-3)
            assert kept.float().mean() > 0.6
    assert not torch.equal(views["stripes1"], views["stripes2"])
    whole = (views["first"] * LUP[1] + LUP[0])[views["first"] != 0]
    assert whole.std() > 0.1                                    # the whole image does mix them


def test_rates_of_grey_flip_and_erasing_without_colour_jitter():
    n, (H, W) = 4000, (32, 16)
    views = ContrastViews((H, W), stripes=0)
    colour = torch.tensor([200, 90, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(n, 3, H, W)
    view = seen(views, colour)["first"]
    erased = (view == 0).all(1)                                 # (n, H, W)
    share = erased.flatten(1).float().mean(1)
    some = share > 0
    assert abs(some.float().mean() - 0.5) < 0.03
    assert 0.01 < share[some].min() < 0.04 and 0.5 < share.max() < 0.63
    reference = uniform_erasing(H, W, n)
    assert abs(share[some].mean() - reference.mean()) < 0.012 and abs(share[some].std() - reference.std()) < 0.012
    pixels = (view * LUP[1] + LUP[0]).transpose(0, 1)[:, ~erased]  # (3, pixels left)
    is_grey = (pixels.amax(0) - pixels.amin(0)) < 1e-3
    luma = (0.299 * 200 + 0.587 * 90 + 0.114 * 40) / 255
    torch.testing.assert_close(pixels[0][is_grey], torch.full_like(pixels[0][is_grey], luma), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pixels[:, ~is_grey], (colour[0, :, :1, 0] / 255).expand(3, int((~is_grey).sum())),
                               rtol=1e-3, atol=1e-3)            # colours of clothes stay what they are
    assert abs(is_grey.float().mean() - 0.2) < 0.03
    ramp = (torch.arange(W) * 16).to(torch.uint8).expand(n, 3, H, W)
    view = seen(views, ramp, 1)["second"]
    plain = ~(view == 0).all(1).flatten(1).any(1)
    flipped = view[plain][..., 0].mean((1, 2)) > view[plain][..., -1].mean((1, 2))
    assert abs(flipped.float().mean() - 0.5) < 0.05


def test_numbers_of_contrast_views_have_luperson_s_distributions():
    views = ContrastViews((256, 128))
    numbers = views.draw(uniforms(5_000, views.uniforms, seed=1))
    assert numbers.shape == (5_000, 10, 11)
    for part, height in ((numbers[:, :2], 256), (numbers[:, 2:], 64)):     # of the image, of its stripes
        top, left, h, w, flip, colourless, sigma, e_top, e_left, e_h, e_w = part.flatten(0, 1).unbind(1)
        assert (top + h <= height).all() and (left + w <= 128).all() and (e_top + e_h <= height).all()
        blurred = sigma > 0.05
        assert abs(blurred.float().mean() - 0.5) < 0.02 and sigma[blurred].mean() == pytest.approx(1.05, abs=0.02)
        assert 0.1 <= sigma[blurred].min() < 0.11 and 1.99 < sigma.max() <= 2
        assert abs(flip.mean() - 0.5) < 0.02 and abs(colourless.mean() - 0.2) < 0.02
    top, left, h, w = numbers[:, :2, :4].flatten(0, 1).unbind(1)
    area, aspect = h * w / (256 * 128), w / h
    fits = ~((h == 256) & (w == 128))                            # the whole image stands in where no crop fits
    assert 0.99 < fits.float().mean() < 1
    area, aspect = area[fits], aspect[fits]
    assert 0.19 < area.min() < 0.21 and 0.66 < area.max() < 0.67  # wider than 3/4 of its height: at most 128 x 171
    assert 0.74 < aspect.min() < 0.76 and 1.3 < aspect.max() < 1.35
    reference = torchvision_crops((0.2, 1.0), 6000, (3 / 4, 4 / 3))
    for ours, theirs in ((area, reference[:, 0]), (aspect, reference[:, 1])):
        assert abs(ours.mean() - theirs.mean()) < 0.012 and abs(ours.std() - theirs.std()) < 0.012


def uniform_erasing(H, W, n):
    """Erased shares by the words of LUPerson's recipe: area U(0.02, 0.6), aspect U(0.3, 1 / 0.3), until one fits."""
    rng, shares = np.random.default_rng(0), []
    while len(shares) < n:
        area, aspect = rng.uniform(0.02, 0.6) * H * W, rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < H and w < W:
            shares.append(h * w / (H * W))
    return np.array(shares)


def test_contrast_views_of_an_image_are_functions_of_its_numbers():
    images, views = noise_images(), ContrastViews((64, 32))
    one = seen(views, images, 5)
    assert not torch.equal(one["first"], one["second"])
    assert not torch.equal(one["first"], seen(views, images, 6)["first"])
    numbers = views.draw(uniforms(6, views.uniforms, seed=5))
    halves = [views(images[part], numbers[part]) for part in (slice(3), slice(3, 6))]
    for key in one:
        torch.testing.assert_close(torch.cat([h[key] for h in halves]), one[key], rtol=1e-5, atol=1e-5)


# ---- machines --------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("views", ALL_VIEWS.values(), ids=ALL_VIEWS)
def test_gpu_equals_cpu(views):
    """... but for the noise of erasing, which each kind of device draws itself."""
    images, numbers = noise_images(), views.draw(uniforms(6, views.uniforms, seed=5))
    views.noise = False
    on_cpu, on_gpu = views(images, numbers), views(images.cuda(), numbers.cuda())
    for a, b in zip(*((v.values() if isinstance(v, dict) else [v]) for v in (on_cpu, on_gpu)), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit_of_a_view():
    images, before, got = noise_images(), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        views = [seen(MultiCrop((64, 32), 2), images, 5), seen(ContrastViews((64, 32), True, 4), images, 5),
                 {"image": seen(FineTuneTransform((64, 32), HALF, HALF), images, 5,
                                noise=erasing_noise(images, 0, 0, 0, 1))}]
        got.append([v for view in views for v in view.values()])
    torch.set_num_threads(before)
    assert len(got[0]) == 8
    for other in got[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got[0], other, strict=True))
