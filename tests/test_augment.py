"""Augmentation against torchvision, against loops, and by distribution."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

import augment
from augment import (IMAGENET_MEAN, IMAGENET_STD, ContrastViews, Draws, FineTuneTransform, MultiCrop, blur_matrix,
                     colour_jitter, grey, inside, normalize, resize_matrix)

# ---- augmentation ----------------------------------------------------------------------------


def test_flip_and_crop_equal_the_loop():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 12, 7), dtype=torch.uint8)
    flip, top, left = torch.tensor([0, 1, 0, 1, 1, 0]).bool(), torch.tensor([0, 20, 3, 10, 7, 10]), \
        torch.tensor([20, 0, 5, 10, 11, 10])
    out = FineTuneTransform((0.5,) * 3, (0.5,) * 3).flip_and_crop(images, flip, top, left)
    for i in range(6):
        image = images[i].flip(-1) if flip[i] else images[i]
        padded = torch.nn.functional.pad(image, [10] * 4)
        assert torch.equal(out[i], padded[:, top[i]:top[i] + 12, left[i]:left[i] + 7])
    assert torch.equal(out[5], images[5])                     # the centre crop undoes the padding


def test_normalize_equals_torchvision():
    from torchvision.transforms.functional import normalize as reference
    x = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(normalize(x, mean, std), reference(x.float() / 255, mean, std))
    assert normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), (0.5,) * 3, (0.5,) * 3).unique() == -1


def test_random_erasing_distribution():
    H, W, n = 64, 32, 6000
    mask = inside(Draws(n, 0, 3).erasures(H, W, (0.02, 1 / 3)), H, W)[:, 0]
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
def test_transform_is_a_function_of_seed_and_step(noise):
    images = torch.randint(0, 256, (8, 3, 32, 16), dtype=torch.uint8)
    transform = FineTuneTransform((0.5,) * 3, (0.5,) * 3, noise=noise)
    one = transform(images, 7, 100)
    assert one.shape == images.shape and one.dtype == torch.float32
    assert torch.equal(one, transform(images, 7, 100))
    assert not torch.equal(one, transform(images, 7, 101)) and not torch.equal(one, transform(images, 8, 100))
    halves = [FineTuneTransform((0.5,) * 3, (0.5,) * 3, noise=noise, rank=r, world=2)(part, 7, 100)
              for r, part in enumerate(images.split(4))]
    assert torch.equal(torch.cat(halves), one)                # 2 processes augment as one does
    outside = one.abs() > 1.001                               # only noise leaves the range of pixels
    assert outside.any() == noise


# ---- views for pre-training ------------------------------------------------------------------


@pytest.mark.parametrize("box, size", [((3, 2, 40, 20), (64, 32)), ((0, 0, 64, 32), (32, 16)), ((10, 5, 7, 9), (32, 16)),
                                       ((1, 0, 60, 31), (20, 9)), ((0, 0, 64, 32), (64, 32))])
def test_resize_equals_torchvision(box, size):
    torch.manual_seed(0)
    x, (top, left, h, w) = torch.rand(2, 3, 64, 32), box
    rows = resize_matrix(torch.full((2,), float(top)), torch.full((2,), float(h)), 64, size[0])
    flip = torch.tensor([False, True])
    columns = resize_matrix(torch.full((2,), float(left)), torch.full((2,), float(w)), 32, size[1], flip)
    wanted = TF.resize(x[:, :, top:top + h, left:left + w], size, InterpolationMode.BICUBIC, antialias=True).clone()
    wanted[1] = wanted[1].flip(-1)
    torch.testing.assert_close(rows[:, None] @ x @ columns[:, None].mT, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(sigma):
    x = torch.rand(2, 3, 40, 20)
    rows, columns = blur_matrix(torch.full((2,), sigma), 40), blur_matrix(torch.full((2,), sigma), 20)
    torch.testing.assert_close(rows[:, None] @ x @ columns[:, None].mT, TF.gaussian_blur(x, [13, 13], [sigma] * 2),
                               rtol=1e-5, atol=1e-5)
    assert torch.equal(blur_matrix(torch.tensor([0.01]), 9)[0], torch.eye(9))


def test_colour_changes_equal_torchvision():
    x, one = torch.rand(2, 3, 9, 7), torch.ones(2, 1, 1, 1)
    x[0, :, 0] = 0.5                                            # grey pixels have no hue
    for which, ours, theirs in ((0, (1.3, 1, 1, 0), TF.adjust_brightness(x, 1.3)),
                                (1, (1, 0.7, 1, 0), TF.adjust_contrast(x, 0.7)),
                                (2, (1, 1, 1.4, 0), TF.adjust_saturation(x, 1.4)),
                                (3, (1, 1, 1, 0.1), TF.adjust_hue(x, 0.1)), (3, (1, 1, 1, -0.07), TF.adjust_hue(x, -0.07))):
        out = colour_jitter(x, *(v * one for v in ours), order=[which])
        torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(colour_jitter(x, one, one, one, 0 * one, [3, 1, 0, 2]), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grey(x), TF.rgb_to_grayscale(x), rtol=1e-3, atol=1e-3)


def test_crops_have_the_areas_and_aspects_of_the_recipe():
    for scale in ((0.4, 1.0), (0.05, 0.8)):
        draws = Draws(20_000, 0, 1)
        boxes, found = draws.rectangles(256, 128, scale, (1 / 0.667, 1 / 0.375), whole=True)
        top, left, h, w = boxes.unbind(1)
        assert torch.equal(Draws(20_000, 0, 1).crops(256, 128, scale, (0.375, 0.667))[found], boxes[found])
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
    n = 3000
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (augment.IMAGENET_MEAN, augment.IMAGENET_STD))
    colour = torch.tensor([200, 90, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(n, 3, 32, 16)
    views = MultiCrop((32, 16), num_local=1)(colour, 0, 0)
    first, second = (v * std + mean for v in views["globals"])
    is_grey = (first.amax(1) - first.amin(1)).flatten(1).amax(1) < 1e-3
    assert abs(is_grey.float().mean() - 0.2) < 0.03
    same = (first - colour.float() / 255).abs().flatten(1).amax(1) < 1e-3
    assert abs(same.float().mean() - 0.2 * 0.8) < 0.03           # neither jitter (0.8) nor grey (0.2)
    flat = torch.full((n, 3, 32, 16), 128, dtype=torch.uint8)
    level = (MultiCrop((32, 16), num_local=1)(flat, 0, 0)["globals"][0] * std + mean).mean((1, 2, 3)) / (128 / 255)
    assert 0.6 <= level.min() < 0.61 and 1.39 < level.max() <= 1.4 and level.mean() == pytest.approx(1, abs=0.02)
    assert abs((level.sub(1).abs() < 1e-4).float().mean() - 0.2) < 0.03  # brightness U(0.6, 1.4), for 0.8 of them
    ramp = (torch.arange(16) * 16).to(torch.uint8).expand(n, 3, 32, 16)
    views = MultiCrop((32, 16), num_local=1)(ramp, 0, 1)
    first, second = (v * std + mean for v in views["globals"])
    flipped = first[..., 0].mean((1, 2)) > first[..., -1].mean((1, 2))
    assert abs(flipped.float().mean() - 0.5) < 0.04
    bright = torch.full((n, 3, 32, 16), 255, dtype=torch.uint8)  # white, solarised, is black
    views = MultiCrop((32, 16), num_local=1)(bright, 0, 2)
    first, second = (v * std + mean for v in views["globals"])
    assert first.amin() > 0.3 and abs((second.amax((1, 2, 3)) < 0.3).float().mean() - 0.2) < 0.03
    board = (255 * ((torch.arange(32)[:, None] // 2 + torch.arange(16) // 2) % 2)).to(torch.uint8).expand(n, 3, 32, 16)
    views = MultiCrop((32, 16), num_local=1, global_scale=(0.999, 1), aspect=(0.4999, 0.5001))(board, 0, 3)
    contrast = [(v * std + mean).std((1, 2, 3)) / (v * std + mean).mean((1, 2, 3)) for v in views["globals"]]
    soft = [(c < 0.6).float().mean() for c in contrast]
    assert soft[0] > soft[1] + 0.3                               # blur: always on the first, 0.1 on the second


def test_views_are_a_function_of_seed_and_step_and_shared_by_processes():
    images = torch.randint(0, 256, (6, 3, 64, 32), dtype=torch.uint8)
    one = MultiCrop((64, 32), num_local=3)(images, 5, 9)
    assert one["globals"].shape == (2, 6, 3, 64, 32) and one["locals"].shape == (3, 6, 3, 32, 16)
    again = MultiCrop((64, 32), num_local=3)(images, 5, 9)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["globals"], MultiCrop((64, 32), num_local=3)(images, 5, 10)["globals"])
    halves = [MultiCrop((64, 32), num_local=3, rank=r, world=2)(part, 5, 9) for r, part in enumerate(images.split(3))]
    for key in one:
        torch.testing.assert_close(torch.cat([h[key] for h in halves], dim=1), one[key], rtol=1e-5, atol=1e-5)
    assert len(MultiCrop((64, 32), num_local=0)(images, 5, 9)["locals"]) == 0
    assert math.isfinite(one["locals"].sum())


def test_a_crop_that_fits_nowhere_is_the_whole_image():
    boxes = Draws(50, 0, 0).crops(64, 32, (1.0, 1.0), (3.0, 4.0))  # as large as the image, yet four times as wide
    assert torch.equal(boxes, torch.tensor([0.0, 0, 64, 32]).expand(50, 4))


# ---- views of UP-ReID ------------------------------------------------------------------------

LUP = [torch.tensor(v).view(3, 1, 1) for v in (augment.LUP_MEAN, augment.LUP_STD)]


def test_original_is_normalised_and_nothing_else():
    images = torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8)
    views = ContrastViews()(images, 0, 0)
    torch.testing.assert_close(views["original"], (images / 255 - LUP[0]) / LUP[1])
    assert set(ContrastViews(original=False, stripes=0)(images, 0, 0)) == {"first", "second"}


def test_stripes_of_both_augmentations_show_the_same_region():
    """Four stripes of four grey levels: whatever is not erased keeps the level of its stripe."""
    levels = torch.tensor([40, 100, 160, 220], dtype=torch.uint8).repeat_interleave(16)
    images = levels.view(1, 1, 64, 1).expand(50, 3, 64, 32).contiguous()
    views = ContrastViews()(images, 0, 0)
    for name in ("stripes1", "stripes2"):
        stripes = views[name]
        assert stripes.shape == (50, 4, 3, 16, 32)
        seen = stripes * LUP[1] + LUP[0]
        for m, level in enumerate((40, 100, 160, 220)):
            kept = (stripes[:, m] != 0).all(1, keepdim=True).expand(-1, 3, -1, -1)
            torch.testing.assert_close(seen[:, m][kept], torch.full((int(kept.sum()),), level / 255), rtol=1e-3, atol=1e-3)
            assert kept.float().mean() > 0.6
    assert not torch.equal(views["stripes1"], views["stripes2"])
    whole = (views["first"] * LUP[1] + LUP[0])[views["first"] != 0]
    assert whole.std() > 0.1                                    # the whole image does mix them


def test_rates_of_grey_flip_and_erasing_without_colour_jitter():
    n, (H, W) = 4000, (32, 16)
    colour = torch.tensor([200, 90, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(n, 3, H, W)
    view = ContrastViews(stripes=0)(colour, 0, 0)["first"]
    erased = (view == 0).all(1)                                 # (n, H, W)
    share = erased.flatten(1).float().mean(1)
    some = share > 0
    assert abs(some.float().mean() - 0.5) < 0.03
    assert 0.01 < share[some].min() < 0.04 and 0.5 < share.max() < 0.63
    reference = uniform_erasing(H, W, n)
    assert abs(share[some].mean() - reference.mean()) < 0.012 and abs(share[some].std() - reference.std()) < 0.012
    seen = (view * LUP[1] + LUP[0]).transpose(0, 1)[:, ~erased]  # (3, pixels left)
    is_grey = (seen.amax(0) - seen.amin(0)) < 1e-3
    luma = (0.299 * 200 + 0.587 * 90 + 0.114 * 40) / 255
    torch.testing.assert_close(seen[0][is_grey], torch.full_like(seen[0][is_grey], luma), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen[:, ~is_grey], (colour[0, :, :1, 0] / 255).expand(3, int((~is_grey).sum())),
                               rtol=1e-3, atol=1e-3)            # colours of clothes stay what they are
    assert abs(is_grey.float().mean() - 0.2) < 0.03
    ramp = (torch.arange(W) * 16).to(torch.uint8).expand(n, 3, H, W)
    view = ContrastViews(stripes=0)(ramp, 0, 1)["second"]
    plain = ~(view == 0).all(1).flatten(1).any(1)
    flipped = view[plain][..., 0].mean((1, 2)) > view[plain][..., -1].mean((1, 2))
    assert abs(flipped.float().mean() - 0.5) < 0.05


def test_numbers_of_contrast_views_have_luperson_s_distributions():
    numbers = ContrastViews().draw(Draws(20_000, 0, 1), 256, 128)
    top, left, h, w, flip, colourless, sigma = numbers[:, :7].unbind(1)
    area, aspect = h * w / (256 * 128), w / h
    fits = ~((h == 256) & (w == 128))                            # the whole image stands in where no crop fits
    assert 0.99 < fits.float().mean() < 1
    area, aspect = area[fits], aspect[fits]
    assert 0.19 < area.min() < 0.21 and 0.66 < area.max() < 0.67  # wider than 3/4 of its height: at most 128 x 171
    assert 0.74 < aspect.min() < 0.76 and 1.3 < aspect.max() < 1.35
    reference = torchvision_crops((0.2, 1.0), 6000, (3 / 4, 4 / 3))
    for ours, theirs in ((area, reference[:, 0]), (aspect, reference[:, 1])):
        assert abs(ours.mean() - theirs.mean()) < 0.012 and abs(ours.std() - theirs.std()) < 0.012
    assert (top + h <= 256).all() and (left + w <= 128).all()
    blurred = sigma > 0.05
    assert abs(blurred.float().mean() - 0.5) < 0.02 and sigma[blurred].mean() == pytest.approx(1.05, abs=0.02)
    assert 0.1 <= sigma[blurred].min() < 0.11 and 1.99 < sigma.max() <= 2
    assert abs(flip.mean() - 0.5) < 0.02 and abs(colourless.mean() - 0.2) < 0.02


def uniform_erasing(H, W, n):
    """Erased shares by the words of LUPerson's recipe: area U(0.02, 0.6), aspect U(0.3, 1 / 0.3), until one fits."""
    rng, shares = np.random.default_rng(0), []
    while len(shares) < n:
        area, aspect = rng.uniform(0.02, 0.6) * H * W, rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < H and w < W:
            shares.append(h * w / (H * W))
    return np.array(shares)


def test_contrast_views_are_shared_by_processes():
    images = torch.randint(0, 256, (6, 3, 64, 32), dtype=torch.uint8)
    one = ContrastViews()(images, 5, 9)
    assert not torch.equal(one["first"], one["second"])
    assert not torch.equal(one["first"], ContrastViews()(images, 5, 10)["first"])
    halves = [ContrastViews(rank=r, world=2)(part, 5, 9) for r, part in enumerate(images.split(3))]
    for key in one:
        torch.testing.assert_close(torch.cat([h[key] for h in halves]), one[key], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("views", [MultiCrop((64, 32), num_local=3), ContrastViews()])
def test_gpu_equals_cpu(views):
    images = torch.randint(0, 256, (6, 3, 64, 32), dtype=torch.uint8)
    on_cpu = views(images, 5, 9)
    for key, value in views(images.cuda(), 5, 9).items():
        torch.testing.assert_close(value.cpu(), on_cpu[key], rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit_of_a_view():
    images = torch.randint(0, 256, (6, 3, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, got = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        views = [MultiCrop((64, 32), 2)(images, 5, 6), ContrastViews(True, 4)(images, 5, 6),
                 {"image": FineTuneTransform(IMAGENET_MEAN, IMAGENET_STD)(images, 5, 6)}]
        got.append([v for view in views for v in view.values()])
    torch.set_num_threads(before)
    assert len(got[0]) == 8
    for other in got[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got[0], other, strict=True))
