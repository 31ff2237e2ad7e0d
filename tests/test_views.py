"""Views: their parameters by distribution and image by image; their pixels against torchvision and against loops."""

import math
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

import data
from data import (ContrastViews, FineTuneTransform, MultiCrop, blur, chance, colour_jitter, crop_resize, erasing_noise, grey, inside, normalize,
                  random_blur, random_box, random_crop, random_erasure)

HALF = (0.5,) * 3


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sampled(views, n, seed=0):
    """Parameters of n images, as workers sample them."""
    return torch.tensor([views.draw(random.Random(f"{seed} 0 {place}")) for place in range(n)])


def many(n, sample, *args, seed=0, **more):
    """What `sample` gives n times."""
    rng = random.Random(seed)
    return torch.tensor([sample(rng, *args, **more) for _ in range(n)])


def seen(views, images, seed=0, **more):
    """What a network sees of images, by the parameters that a worker samples for them."""
    return views(images, sampled(views, len(images), seed), **more)


def noise_images(n=6, size=(64, 32)):
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


ALL_VIEWS = {"fine-tuning": FineTuneTransform((64, 32), HALF, HALF), "two crops": MultiCrop((64, 32), num_local=0),
             "five crops": MultiCrop((64, 32), num_local=3), "contrast": ContrastViews((64, 32)),
             "contrast alone": ContrastViews((64, 32), original=False, stripes=0)}


# ---- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ALL_VIEWS.values(), ids=ALL_VIEWS)
def test_parameters_of_an_image_are_a_function_of_its_generator(views):
    """... bit for bit, whatever else is sampled meanwhile, here or by other generators; and of no other source."""
    shape = {"FineTuneTransform": (9, 7), "MultiCrop": (9, 2 + getattr(views, "num_local", 0), 12),
             "ContrastViews": (9, 2 + 2 * getattr(views, "stripes", 0), 11)}[type(views).__name__]
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    whole = sampled(views, 9)
    assert whole.shape == shape and whole.dtype == torch.float32
    again = {place: views.draw(random.Random(f"0 0 {place}")) for place in (8, 3, 0)}
    assert all(torch.equal(torch.tensor(row), whole[place]) for place, row in again.items())
    assert len(whole.flatten(1).unique(dim=0)) == 9
    assert not any(torch.equal(a, b) for a, b in zip(whole, sampled(views, 9, seed=1)))
    one = random.Random(3)
    assert views.draw(one) != views.draw(one)
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state()) and states[2] == np.random.get_state()[1].tolist()


def test_chances_are_as_often_as_they_say():
    for p in (0.0, 0.2, 0.5, 1.0):
        happened = many(20_000, chance, p)
        assert set(happened.tolist()) <= {0.0, 1.0} and abs(happened.mean() - p) < 0.01 * (0 < p < 1) + 1e-9


def test_blurs_are_as_often_and_as_wide_as_they_say():
    assert many(100, random_blur, 0.0).unique().tolist() == [0]
    for p in (0.1, 0.5, 1.0):
        sigma = many(20_000, random_blur, p)
        blurred = sigma[sigma > 0]
        assert abs(len(blurred) / 20_000 - p) < 0.01 * (p < 1) + 1e-9
        assert 0.1 <= blurred.min() < 0.11 and 1.99 < blurred.max() <= 2
        assert blurred.mean() == pytest.approx(1.05, abs=0.03) and blurred.std() == pytest.approx(1.9 / 12 ** 0.5, rel=0.03)


def test_boxes_lie_evenly_wherever_there_is_room():
    """Each place as often as any other, the first and the last too."""
    boxes = many(20_000, random_box, (20, 12), (0.35, 0.35), (1.0, 1.0))
    assert boxes[:, 2:].unique(dim=0).tolist() == [[9, 9]]            # 0.35 of 240 is 9 x 9
    for place, room in ((boxes[:, 0], 11), (boxes[:, 1], 3)):
        counts = torch.bincount(place, minlength=room + 1)
        assert len(counts) == room + 1 and (counts / 20_000 * (room + 1) - 1).abs().max() < 0.1
    whole = many(50, random_box, (20, 12), (1.0, 1.0), (20 / 12, 20 / 12))
    assert torch.equal(whole, torch.tensor([0, 0, 20, 12]).expand(50, 4))  # as large as the image is no larger
    assert random_box(random.Random(0), (20, 12), (1.0, 1.0), (1.0, 1.0)) is None


@pytest.mark.parametrize("log", [True, False])
def test_aspects_of_boxes_are_height_by_width(log):
    """... between the two, evenly or evenly in the logarithm, where everything fits."""
    h, w = many(20_000, random_box, (4000, 4000), (0.2, 0.2), (0.5, 4.0), log=log)[:, 2:].double().unbind(1)
    ratio = (h / w).log() if log else h / w
    low, high = (math.log(0.5), math.log(4)) if log else (0.5, 4)
    assert low - 0.01 < ratio.min() < low + 0.01 and high - 0.01 < ratio.max() < high + 0.01
    assert ratio.mean() == pytest.approx((low + high) / 2, abs=0.01 * (high - low))
    assert ratio.std() == pytest.approx((high - low) / 12 ** 0.5, rel=0.02)
    torch.testing.assert_close(h * w, torch.full_like(h, 0.2 * 4000 ** 2), rtol=1e-3, atol=0)


# ---- augmentation of fine-tuning -------------------------------------------------------------


def test_flip_and_crop_equal_the_loop():
    images = noise_images(6, (12, 7))
    flip, top, left = torch.tensor([0, 1, 0, 1, 1, 0]).bool(), torch.tensor([0, 20, 3, 10, 7, 10]), \
        torch.tensor([20, 0, 5, 10, 11, 10])
    params = torch.cat([torch.stack([flip, top, left], dim=1).float(), torch.zeros(6, 4)], dim=1)
    out = FineTuneTransform((12, 7), (0.0,) * 3, (1 / 255,) * 3, noise=False)(images, params).round()
    for i in range(6):
        image = images[i].flip(-1) if flip[i] else images[i]
        padded = torch.nn.functional.pad(image, [10] * 4)
        assert torch.equal(out[i], padded[:, top[i]:top[i] + 12, left[i]:left[i] + 7])
    assert torch.equal(out[5], images[5])                     # the centre crop undoes the padding


def test_places_of_crops_and_flips_are_sampled_evenly():
    flip, top, left = sampled(FineTuneTransform((64, 32), HALF, HALF), 20_000)[:, :3].T
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
    boxes = many(n, random_erasure, (H, W), (0.02, 1 / 3), seed=3)
    mask = inside(boxes, H, W)[:, 0]
    erased = mask.flatten(1).any(1)
    assert abs(erased.float().mean() - 0.5) < 0.02 and torch.equal(boxes[~erased], torch.zeros_like(boxes[~erased]))
    rows, columns = mask.any(2).sum(1)[erased], mask.any(1).sum(1)[erased]
    assert torch.equal(rows * columns, mask[erased].flatten(1).sum(1))    # a full rectangle, nothing else
    assert torch.equal(torch.stack([rows, columns], dim=1), boxes[erased][:, 2:])  # ... of which no part lies outside
    share = rows * columns / (H * W)
    assert 0.015 < share.min() < 0.03 and 0.31 < share.max() < 0.345     # 2 % to 1/3, up to rounding
    reference, aspects = timm_erasing(H, W, 6000)
    assert abs(share.mean() - reference.mean()) < 0.006 and abs(share.std() - reference.std()) < 0.006
    ours = (rows / columns).log()
    assert abs(ours.mean() - aspects.mean()) < 0.05 and abs(ours.std() - aspects.std()) < 0.05
    hit = mask[erased].float().mean(0)
    assert (hit - hit.flip(0)).abs().max() < 0.05 and (hit - hit.flip(1)).abs().max() < 0.05  # no side preferred


def timm_erasing(H, W, n):
    """Erased shares of images and logarithms of their aspects by the words of the recipe, one image at a time."""
    rng, shares, aspects = np.random.default_rng(0), [], []
    while len(shares) < n:
        for _ in range(10):
            area, aspect = rng.uniform(0.02, 1 / 3) * H * W, np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h < H and w < W:
                shares.append(h * w / (H * W))
                aspects.append(np.log(h / w))
                break
    return np.array(shares), np.array(aspects)


@pytest.mark.parametrize("noise", [True, False])
def test_erased_pixels_get_noise_shared_by_processes_or_the_mean(noise):
    images, one = noise_images(8, (32, 16)), FineTuneTransform((32, 16), HALF, HALF, noise=noise)
    params = sampled(one, 8)
    shared = [erasing_noise(images[:8 // n], 5, 7, rank, n) for n in (1, 2, 4) for rank in range(n)]
    filled = shared[0] if noise else None
    out = one(images, params, filled)
    assert out.shape == images.shape and out.dtype == torch.float32
    erased = inside(params[:, 3:], 32, 16).expand(-1, 3, -1, -1)
    nothing_erased = torch.cat([params[:, :3], torch.zeros(8, 4)], dim=1)
    plain = FineTuneTransform((32, 16), HALF, HALF, noise=False)(images, nothing_erased)
    assert torch.equal(out[~erased], plain[~erased]) and erased.any()
    assert torch.equal(out[erased], (filled if noise else torch.zeros_like(out))[erased])
    for part in (shared[1:3], shared[3:]):                    # 2 or 4 processes sample as one does
        assert torch.equal(torch.cat(part), shared[0])
    assert shared[0].mean().abs() < 0.05 and 0.95 < shared[0].std() < 1.05
    assert torch.equal(erasing_noise(images, 5, 7), shared[0])
    assert not torch.equal(erasing_noise(images, 5, 8), shared[0]) and not torch.equal(erasing_noise(images, 6, 7), shared[0])
    outside = out.abs() > 1.001                               # only noise leaves the range of pixels
    assert outside.any() == noise


# ---- pixels of views -------------------------------------------------------------------------


@pytest.mark.parametrize("box, size", [((3, 2, 40, 20), (64, 32)), ((0, 0, 64, 32), (32, 16)),
                                       ((10, 5, 7, 9), (32, 16)), ((1, 0, 60, 31), (20, 9)),
                                       ((0, 0, 64, 32), (64, 32))])
def test_resize_equals_torchvision(box, size):
    x, (top, left, h, w) = uniforms(2, 3, 64, 32), box
    wanted = TF.resize(x[:, :, top:top + h, left:left + w], size, InterpolationMode.BICUBIC, antialias=True).clone()
    wanted[1] = wanted[1].flip(-1)
    out = crop_resize(x, torch.tensor([box, box]).float(), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), size)
    torch.testing.assert_close(out, wanted.clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_each_image_of_a_batch_has_its_own_crop():
    x, boxes = uniforms(5, 3, 64, 32), many(5, random_crop, (64, 32), (0.1, 0.9), (0.4, 0.7)).float()
    flip = torch.tensor([0.0, 1, 1, 0, 1]).view(5, 1, 1, 1)
    out = crop_resize(x, boxes, flip, (24, 12))
    for i in range(5):
        assert torch.equal(out[i:i + 1], crop_resize(x[i:i + 1], boxes[i:i + 1], flip[i:i + 1], (24, 12)))
    assert torch.equal(crop_resize(x, torch.tensor([0.0, 0, 64, 32]).expand(5, 4), flip * 0, (64, 32)), x)  # nothing to do


def per_image(*values):
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(sigma):
    """... wherever no pixel beyond the border counts."""
    x = uniforms(2, 3, 40, 32)
    wanted = TF.gaussian_blur(x, [25, 25], [sigma] * 2)
    torch.testing.assert_close(blur(x, per_image(sigma, sigma))[:, :, 12:-12, 12:-12], wanted[:, :, 12:-12, 12:-12], rtol=1e-5, atol=1e-5)


def test_blur_at_the_border_equals_the_loop():
    """Every pixel is the mean of all that exist, weighted by the bell around it; each image has its own sigma."""
    x, sigmas = uniforms(3, 3, 9, 5), (0.3, 1.1, 2.0)
    out, pixels = blur(x, per_image(*sigmas)), x.double().numpy()
    for n, sigma in enumerate(sigmas):
        for i in range(9):
            for j in range(5):
                total, weights = np.zeros(3), 0.0
                for k in range(9):
                    for m in range(5):
                        weight = math.exp(-((k - i) ** 2 + (m - j) ** 2) / (2 * sigma ** 2))
                        total, weights = total + weight * pixels[n, :, k, m], weights + weight
                np.testing.assert_allclose(out[n, :, i, j].numpy(), total / weights, rtol=1e-5, atol=1e-6)


def test_no_blur_changes_no_bit():
    x = uniforms(3, 3, 9, 5)
    x[:, :, ::2] = 0                                            # black would take the faintest light of its neighbours
    out = blur(x, per_image(0, 1.5, 0))
    assert torch.equal(out[0], x[0]) and torch.equal(out[2], x[2]) and not torch.allclose(out[1], x[1], atol=1e-2)
    flat = torch.full((1, 3, 9, 5), 0.7)
    torch.testing.assert_close(blur(flat, per_image(1.5)), flat)      # no border gets darker


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
REFERENCE = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def one_change(which, value, n=2):
    """Arguments of `colour_jitter` for one change alone."""
    values = [1.0, 1.0, 1.0, 0.0]
    values[which] = value
    return [per_image(*[v] * n) for v in values]


@pytest.mark.parametrize("which, value", [(BRIGHTNESS, 1.3), (BRIGHTNESS, 0.6), (CONTRAST, 0.7), (CONTRAST, 1.4), (SATURATION, 1.4),
                                          (SATURATION, 0.8), (HUE, 0.1), (HUE, -0.07)])
def test_colour_changes_equal_torchvision(which, value):
    x = uniforms(2, 3, 9, 7)
    x[0, :, 0] = 0.5                                            # grey pixels have no hue
    out = colour_jitter(x, *one_change(which, value))
    torch.testing.assert_close(out, REFERENCE[which](x, value), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(colour_jitter(x, *one_change(HUE, 0.0)), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grey(x), TF.rgb_to_grayscale(x), rtol=1e-3, atol=1e-3)


def test_colours_change_in_one_order():
    """Brightness, contrast, saturation, hue: each image is what torchvision makes of it, one change after another."""
    x, strengths = uniforms(40, 3, 9, 7, seed=1), torch.tensor([0.4, 0.4, 0.2, 0.1])
    values = (2 * uniforms(40, 4) - 1) * strengths + torch.tensor([1.0, 1, 1, 0])
    out = colour_jitter(x, *values.T[:, :, None, None, None])
    other = 0
    for i in range(40):
        wanted = reverse = x[i]
        for which in range(4):
            wanted = REFERENCE[which](wanted, values[i, which].item())
            reverse = REFERENCE[3 - which](reverse, values[i, 3 - which].item())
        torch.testing.assert_close(out[i], wanted, rtol=1e-4, atol=2e-4)
        other += not torch.allclose(out[i], reverse, rtol=1e-4, atol=2e-4)
    assert other == 40                                          # the order can be seen


def test_colours_are_sampled_as_the_recipe_says():
    params = sampled(MultiCrop((64, 32), num_local=1), 10_000).flatten(0, 1)
    factors, turn = params[:, 4:7], params[:, 7]
    plain = (factors == 1).all(1) & (turn == 0)
    assert abs(plain.float().mean() - 0.2) < 0.01
    for which, strength in ((BRIGHTNESS, 0.4), (CONTRAST, 0.4), (SATURATION, 0.2)):
        values = factors[~plain, which]
        assert 1 - strength <= values.min() < 1 - 0.99 * strength and 1 + 0.99 * strength < values.max() <= 1 + strength
        assert values.mean() == pytest.approx(1, abs=0.01)
        assert values.std() == pytest.approx(strength / 3 ** 0.5, rel=0.02)
    assert -0.1 <= turn.min() < -0.099 and 0.099 < turn.max() <= 0.1
    assert turn[~plain].std() == pytest.approx(0.1 / 3 ** 0.5, rel=0.02) and abs(turn.mean()) < 0.002
    related = torch.corrcoef(params[~plain, 4:8].T) - torch.eye(4)
    assert related.abs().max() < 0.03                           # each by itself


# ---- views of PersonViT ----------------------------------------------------------------------


def test_crops_have_the_areas_and_aspects_of_the_recipe():
    for scale in ((0.4, 1.0), (0.05, 0.8)):
        found = [random_box(random.Random(i), (256, 128), scale, (1 / 0.667, 1 / 0.375)) for i in range(20_000)]
        crops = [random_crop(random.Random(i), (256, 128), scale, (0.375, 0.667)) for i in range(20_000)]
        assert all(crop == (box or [0, 0, 256, 128]) for box, crop in zip(found, crops))
        boxes = torch.tensor([box for box in found if box])
        assert len(boxes) > 0.98 * 20_000
        top, left, h, w = boxes.unbind(1)
        area, aspect = h * w / (256 * 128), w / h
        assert scale[0] - 0.01 < area.min() and area.max() < scale[1] + 0.01
        assert 0.36 < aspect.min() and aspect.max() < 0.69
        assert (top >= 0).all() and (left >= 0).all() and (top + h <= 256).all() and (left + w <= 128).all()
        for place, room in ((top, 256 - h), (left, 128 - w)):        # evenly in the room that is left
            where = ((place + 0.5) / (room + 1))[room > 9]
            assert where.mean() == pytest.approx(0.5, abs=0.01) and where.std() == pytest.approx(12 ** -0.5, rel=0.02)
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
    """Each image is a function of its parameters; rates are counted over the views of many flat or simple images."""
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


def test_rates_of_blur_solarisation_and_crops_by_view():
    params = sampled(MultiCrop((64, 32), num_local=2), 6000).transpose(0, 1)     # (2 + 2, images, 12)
    for view, blurred, inverted, low, high in zip(params, (1, 0.1, 0.5, 0.5), (0, 0.2, 0, 0), (0.4, 0.4, 0.05, 0.05), (1, 1, 0.8, 0.8)):
        assert abs((view[:, 10] > 0).float().mean() - blurred) < 0.02 * (blurred < 1) + 1e-9
        assert abs(view[:, 11].mean() - inverted) < 0.02 * (inverted > 0) + 1e-9
        assert abs(view[:, 8].mean() - 0.5) < 0.02 and abs(view[:, 9].mean() - 0.2) < 0.02
        area = view[:, 2] * view[:, 3] / (64 * 32)
        fits = area < 1                                          # the whole image stands in where no crop fits
        assert fits.float().mean() > 0.95 and low - 0.02 < area.min() < low + 0.02 and area[fits].max() < high + 0.03
    assert params[:, :, 8:].flatten(0, 1)[:, [0, 1, 3]].unique().tolist() == [0, 1]


def test_views_of_an_image_are_functions_of_its_parameters():
    images, views = noise_images(), MultiCrop((64, 32), num_local=3)
    one = seen(views, images, 5)
    assert one["globals"].shape == (2, 6, 3, 64, 32) and one["locals"].shape == (3, 6, 3, 32, 16)
    again = seen(views, images, 5)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["globals"], seen(views, images, 6)["globals"])
    params = sampled(views, 6, 5)
    halves = [views(images[part], params[part]) for part in (slice(3), slice(3, 6))]
    for key in one:
        torch.testing.assert_close(torch.cat([h[key] for h in halves], dim=1), one[key], rtol=1e-5, atol=1e-5)
    assert set(seen(MultiCrop((64, 32), num_local=0), images)) == {"globals"}
    assert math.isfinite(one["locals"].sum())
    twice = seen(views, images[:1].repeat(2, 1, 1, 1))           # a sampler may repeat an image in a batch
    assert not torch.equal(twice["globals"][:, 0], twice["globals"][:, 1])


def test_a_crop_that_fits_nowhere_is_the_whole_image():
    boxes = many(50, random_crop, (64, 32), (1.0, 1.0), (3.0, 4.0))  # as large as the image, yet far wider
    assert torch.equal(boxes, torch.tensor([0, 0, 64, 32]).expand(50, 4))


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
    reference, _ = uniform_erasing(H, W, n)
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
    params = sampled(views, 5_000, 1)
    assert params.shape == (5_000, 10, 11)
    for part, height in ((params[:, :2], 256), (params[:, 2:], 64)):       # of the image, of its stripes
        top, left, h, w, e_top, e_left, e_h, e_w, flip, colourless, sigma = part.flatten(0, 1).unbind(1)
        assert (top + h <= height).all() and (left + w <= 128).all() and (e_top + e_h <= height).all() and (e_left + e_w <= 128).all()
        blurred = sigma > 0
        assert abs(blurred.float().mean() - 0.5) < 0.02 and sigma[blurred].mean() == pytest.approx(1.05, abs=0.02)
        assert 0.1 <= sigma[blurred].min() < 0.11 and 1.99 < sigma.max() <= 2
        assert abs(flip.mean() - 0.5) < 0.02 and abs(colourless.mean() - 0.2) < 0.02
        erased = e_h > 0
        shares, aspects = uniform_erasing(height, 128, 10_000)
        assert abs(erased.float().mean() - 0.5) < 0.02 and torch.equal(erased, e_w > 0)
        ours, tall = e_h[erased] * e_w[erased] / (height * 128), (e_h[erased] / e_w[erased]).log()
        assert 0.015 < ours.min() < 0.025 and ours.max() < 0.61
        assert abs(ours.mean() - shares.mean()) < 0.012 and abs(ours.std() - shares.std()) < 0.012
        assert abs(tall.mean() - aspects.mean()) < 0.04 and abs(tall.std() - aspects.std()) < 0.04  # higher than wide, more often
    top, left, h, w = params[:, :2, :4].flatten(0, 1).unbind(1)
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
    """Erased shares, and logarithms of height by width, by the words of LUPerson's recipe: area U(0.02, 0.6), aspect
    U(0.3, 1 / 0.3), until one fits."""
    rng, shares, aspects = np.random.default_rng(0), [], []
    while len(shares) < n:
        area, aspect = rng.uniform(0.02, 0.6) * H * W, rng.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < H and w < W:
            shares.append(h * w / (H * W))
            aspects.append(math.log(h / w))
    return np.array(shares), np.array(aspects)


def test_contrast_views_of_an_image_are_functions_of_its_parameters():
    images, views = noise_images(), ContrastViews((64, 32))
    one = seen(views, images, 5)
    assert not torch.equal(one["first"], one["second"])
    assert not torch.equal(one["first"], seen(views, images, 6)["first"])
    params = sampled(views, 6, 5)
    halves = [views(images[part], params[part]) for part in (slice(3), slice(3, 6))]
    for key in one:
        torch.testing.assert_close(torch.cat([h[key] for h in halves]), one[key], rtol=1e-5, atol=1e-5)


# ---- machines --------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("views", ALL_VIEWS.values(), ids=ALL_VIEWS)
def test_gpu_equals_cpu(views):
    """... but for the noise of erasing, which each kind of device samples itself."""
    images, params = noise_images(), sampled(views, 6, 5)
    on_cpu, on_gpu = views(images, params), views(images.cuda(), params.cuda())
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
