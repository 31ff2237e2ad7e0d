"""The ResNet of upreid.py against torchvision's; the losses against their formulas; the objective."""

import dataclasses
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import PATIENCE, ROOT

import upreid
from upreid import GroupedBatchNorm, ResNet, UPReID, UPReIDRecipe, global_consistency, info_nce, intrinsic_contrast

# parameters without a classifier; torchvision's resnet50 has 25,557,032 with its fc of 2,049,000
SIZES = {"resnet50": 23_508_032, "resnet_tiny": 2_011_168}


def test_parameter_counts_of_every_model():
    models = {n for n in vars(upreid) if n.startswith("resnet")}
    assert models == set(SIZES)
    for name, size in SIZES.items():
        assert sum(p.numel() for p in getattr(upreid, name)().parameters()) == size


@pytest.mark.parametrize("training", [False, True])
def test_equals_torchvision(training):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None)
    theirs.fc = torch.nn.Identity()
    for module in theirs.modules():  # running statistics and scales that are not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = upreid.resnet50(last_stride=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.train(training), theirs.train(training)
    x = torch.randn(3, 3, 96, 48, requires_grad=True)
    y, z = x.detach().clone().requires_grad_(), x
    out_ours, out_theirs = ours(y), theirs(z)
    weight = torch.randn_like(out_ours)
    (out_ours * weight).sum().backward()
    (out_theirs * weight).sum().backward()
    torch.testing.assert_close(out_ours, out_theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-3, atol=1e-5)


def test_last_stride_refines_the_map_without_parameters():
    x = torch.randn(2, 3, 128, 64)
    coarse, fine = upreid.resnet_tiny(2).eval(), upreid.resnet_tiny(1).eval()
    assert coarse.forward_features(x).shape == (2, 1024, 4, 2)
    assert fine.forward_features(x).shape == (2, 1024, 8, 4)
    fine.load_state_dict(coarse.state_dict(), strict=True)
    assert fine(x).shape == (2, fine.embed_dim) == (2, 1024)
    torch.testing.assert_close(fine(x), fine.forward_features(x).mean((2, 3)))


def test_deep_networks_start_with_blocks_that_add_nothing():
    torch.manual_seed(0)
    net, x = upreid.ResNet((1, 2, 1, 1), 4), torch.rand(2, 16, 8, 4)      # after a ReLU: not negative
    first, second = net.layer2
    shortcut = first.downsample(x).relu()
    torch.testing.assert_close(first(x), shortcut)
    assert torch.equal(second(shortcut), shortcut)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):                        # the first step frees the blocks, the second reaches all that is in them
        optimizer.zero_grad()
        net(torch.rand(2, 3, 32, 16)).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    block = upreid.resnet_tiny().layer1[0]
    assert all(m.weight.eq(1).all() for m in (block.bn1, block.bn2, block.bn3))


@pytest.mark.parametrize("depths", [(1, 1, 1), (1, 1, 0, 1)])
def test_bad_depths_raise(depths):
    with pytest.raises(AssertionError, match="four stages"):
        upreid.ResNet(depths)


def test_files_of_both_methods_run_alone_in_an_empty_folder(tmp_path):
    """A model each, and a step on noise whose losses are numbers."""
    started = {}
    for module in ("upreid", "personvit"):                       # both at once
        (tmp_path / module).mkdir()
        (tmp_path / module / f"{module}.py").write_text((ROOT / f"{module}.py").read_text())
        started[module] = subprocess.Popen([sys.executable, "-I", f"{module}.py"], cwd=tmp_path / module, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for module, process in started.items():
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        assert "feature" in out
        total = re.search(r"one step on noise: {'total': ([\d.]+), ", out)
        assert math.isfinite(float(total[1])) and os.listdir(tmp_path / module) == [f"{module}.py"]


# ---- losses ----------------------------------------------------------------------------------


def unit(*shape, seed=0):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


@pytest.mark.parametrize("B, K, t", [(1, 1, 1.0), (3, 7, 0.1), (5, 2, 0.3)])
def test_info_nce_equals_the_loop(B, K, t):
    q, k, queue = unit(B, 6, seed=1), unit(B, 6, seed=2), unit(K, 6, seed=3)
    total = 0.0
    for i in range(B):
        positive = math.exp(dot(q[i], k[i]) / t)
        total -= math.log(positive / (positive + sum(math.exp(dot(q[i], n) / t) for n in queue))) / B
    assert info_nce(q, k, queue, t).item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("B, K, t", [(1, 1, 1.0), (3, 7, 0.05), (5, 2, 0.3)])
def test_global_consistency_equals_the_loop(B, K, t):
    q, o, queue = unit(B, 6, seed=1), unit(B, 6, seed=2), unit(K, 6, seed=3)
    total = 0.0
    for i in range(B):
        weights = [[math.exp(dot(x[i], n) / t) for n in queue] for x in (q, o)]
        P, R = ([w / sum(row) for w in row] for row in weights)
        total += sum(p * math.log(p / r) / 2 + r * math.log(r / p) / 2 for p, r in zip(P, R)) / B
    assert global_consistency(q, o, queue, t).item() == pytest.approx(total, rel=1e-9, abs=1e-12)


def test_global_consistency_moves_q_alone():
    q, o, queue = (unit(4, 6, seed=s).requires_grad_() for s in range(3))
    global_consistency(q, o, queue.detach(), 0.1).backward()
    assert q.grad.abs().sum() > 0 and o.grad is None
    assert global_consistency(q, q, queue.detach(), 0.1).item() == pytest.approx(0, abs=1e-15)
    assert global_consistency(q, o, queue.detach(), 0.1).item() == pytest.approx(
        global_consistency(o, q, queue.detach(), 0.1).item())


@pytest.mark.parametrize("B, M, h, t", [(1, 2, 1, 1.0), (3, 4, 2, 0.1), (2, 6, 5, 0.3), (4, 5, 1, 0.2)])
def test_intrinsic_contrast_equals_the_loop(B, M, h, t):
    a, b = unit(B, M, 6, seed=1), unit(B, M, 6, seed=2)
    total = 0.0
    for i in range(B):
        for m in range(M):
            positive = math.exp(dot(a[i, m], b[i, m]) / t)
            others = sorted((math.exp(dot(a[i, m], b[i, j]) / t) for j in range(M) if j != m), reverse=True)
            total -= math.log(positive / (positive + sum(others[:h]))) / (B * M)
    assert intrinsic_contrast(a, b, t, h).item() == pytest.approx(total, rel=1e-10)


def test_all_other_stripes_are_the_plain_loss():
    a, b = unit(3, 4, 6, seed=1), unit(3, 4, 6, seed=2)
    plain = F.cross_entropy((a @ b.mT / 0.1).flatten(0, 1), torch.arange(4).repeat(3))
    torch.testing.assert_close(intrinsic_contrast(a, b, 0.1, 3), plain)
    for hardest in (0, 4):
        with pytest.raises(AssertionError, match="of the 3 other stripes"):
            intrinsic_contrast(a, b, 0.1, hardest)


def test_what_a_network_that_knows_nothing_pays():
    same = torch.ones(3, 4, 6) / 6 ** 0.5
    assert info_nce(same[:, 0], same[:, 1], same[0, :1].expand(9, -1), 0.1).item() == pytest.approx(math.log(10))
    assert intrinsic_contrast(same, same, 0.1, 2).item() == pytest.approx(math.log(3))


# ---- the objective ---------------------------------------------------------------------------


def small_model(**kwargs):
    torch.manual_seed(0)
    recipe = UPReIDRecipe(**{"dim": 6, "queue": 10, "groups": 1} | kwargs)
    return UPReID(ResNet((1, 1, 1, 1), 2, 2), recipe, recipe.groups).train()


def small_views(B=4, M=4, seed=0):
    torch.manual_seed(seed)
    views = {name: torch.randn(B, 3, 32, 16) for name in ("first", "second", "original")}
    return views | {name: torch.randn(B, M, 3, 32 // M, 16) for name in ("stripes1", "stripes2")}


def plain_forward(model, views):
    """Every view through its encoder on its own; batch norm is fixed, so that order and grouping are nothing."""
    f, g = model.online, model.momentum
    def encode(net, x, head="head"):
        return F.normalize(net[head](net["backbone"](x)), dim=1)
    with torch.no_grad():
        k, o = encode(g, views["second"]), encode(g, views["original"])
        b = torch.stack([encode(g, s, "stripe_head") for s in views["stripes2"].unbind(1)], dim=1)
    q = encode(f, views["first"])
    a = torch.stack([encode(f, s, "stripe_head") for s in views["stripes1"].unbind(1)], dim=1)
    r = model.recipe
    loss = info_nce(q, k, model.queue, r.temperature)
    loss = loss + r.weight_global * global_consistency(q, o, model.queue, r.temperature_global)
    return loss + r.weight_local * intrinsic_contrast(a, b, r.temperature_local, r.hardest), k


@pytest.mark.parametrize("B, M, groups", [(4, 4, 2), (6, 2, 3), (1, 4, 1), (8, 4, 1)])
def test_fast_equals_plain(doubles, B, M, groups):
    model = small_model(groups=groups, weight_global=0.7, weight_local=0.3, hardest=1, temperature=0.2,
                        temperature_global=0.3, temperature_local=0.4).eval()
    views = small_views(B, M)
    with torch.no_grad():
        for p in model.momentum.parameters():
            p.add_(0.1 * torch.randn_like(p))
    plain, k = plain_forward(model, views)
    plain.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    ours = model(views)
    ours["total"].backward()
    torch.testing.assert_close(ours["total"], plain, rtol=1e-5, atol=1e-6)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted) == {n for n, _ in model.named_parameters() if n.startswith("online")}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    model.update_teacher(1.0)
    torch.testing.assert_close(model.queue[:B], k)


def test_instance_contrast_alone_is_moco_and_needs_no_other_views():
    model = small_model(weight_global=0, weight_local=0)
    views = small_views()
    losses = model({name: views[name] for name in ("first", "second")})
    assert "global" not in losses and "local" not in losses and torch.equal(losses["total"], losses["instance"])
    assert not any("stripe" in name for name in model.state_dict())


@pytest.mark.parametrize("K, sizes", [(10, [4, 4, 4]), (7, [3, 5, 2, 7, 1]), (4, [9, 2]), (5, [5, 5])])
def test_queue_is_first_in_first_out_around_its_end(K, sizes):
    model = small_model(queue=K, weight_global=0, weight_local=0)
    order, n = [row.clone() for row in model.queue], 0           # oldest first
    for size in sizes:
        keys = torch.arange(n, n + size, dtype=torch.float32)[:, None].expand(size, 6)
        n += size
        model.new_keys = list(keys.split(2))                     # of several forwards
        model.update_teacher(1.0)
        order = (order + list(keys))[-K:]
        start = int(model.oldest)
        torch.testing.assert_close(torch.cat([model.queue[start:], model.queue[:start]]), torch.stack(order))


def test_keys_enter_the_queue_after_the_step():
    model, views = small_model(), small_views()
    before = model.queue.clone()
    model(views)["total"].backward()
    assert torch.equal(model.queue, before)                      # no image is its own negative
    model.update_teacher(0.9)
    assert not torch.equal(model.queue[:4], before[:4]) and torch.equal(model.queue[4:], before[4:])
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(10))
    assert model.oldest == 4 and not model.new_keys


def test_momentum_encoder_is_a_moving_average():
    model, start = small_model(), None
    start = [p.detach().clone() for p in model.momentum.parameters()]
    for p in model.online.parameters():
        p.data.add_(1.0)
    for _ in range(3):
        model.new_keys.append(torch.empty(0, 6))                 # a step without images
        model.update_teacher(0.9)
    for old, new in zip(start, model.momentum.parameters()):     # the distance 1 shrinks by 0.9 a step
        torch.testing.assert_close(new.detach(), old + 1 - 0.9 ** 3, rtol=1e-4, atol=1e-5)


def batches_of(net, action):
    """The images (by their constant value) that the net normalised together."""
    groups = []
    handle = net.conv1.register_forward_pre_hook(lambda _, args: groups.extend(
        part[:, 0, 0, 0].int().tolist() for part in args[0].chunk(net.bn1.groups)))
    action()
    handle.remove()
    return groups


@pytest.mark.parametrize("compiled", [False, True])
def test_parts_of_a_batch_have_statistics_of_their_own(monkeypatch, compiled):
    torch.manual_seed(0)
    x, ours, plain = torch.randn(6, 4, 3, 5), GroupedBatchNorm(4), torch.nn.BatchNorm2d(4)
    ours.groups = 3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)   # what a compiled graph is made of
    exact = {"rtol": 1e-5, "atol": 1e-6} if compiled else {"rtol": 0, "atol": 0}
    with torch.no_grad():
        ours.weight.copy_(torch.randn(4))
        plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), torch.cat([plain(part) for part in x.split(2)]), **exact)
    for name, value in plain.state_dict().items():               # running statistics, too
        torch.testing.assert_close(ours.state_dict()[name], value, **exact)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), **exact)


@pytest.mark.parametrize("B, groups", [(4, 2), (16, 4), (12, 2)])
def test_statistics_of_query_and_key_come_from_different_images(B, groups):
    model = small_model(groups=groups, weight_local=0)
    views = {name: torch.arange(B).float().view(B, 1, 1, 1).expand(B, 3, 32, 16)
             for name in ("first", "second", "original")}
    queries = batches_of(model.online["backbone"], lambda: model(views))
    keys = batches_of(model.momentum["backbone"], lambda: model(views))
    assert sorted(sum(queries, [])) == list(range(B)) and sorted(sum(keys, [])) == sorted([*range(B)] * 2)
    for i in range(B):
        with_query = next(set(group) for group in queries if i in group)
        with_key = next(set(group) for group in keys if i in group)
        mates = (with_query & with_key) - {i}                    # of B / groups - 1 mates of the query
        assert len(mates) <= -(-B // groups ** 2) - 1
    model.shuffle = False
    keys = batches_of(model.momentum["backbone"], lambda: model(views))
    assert [sorted(set(group)) for group in keys] == queries     # the test can see a leak


def test_keys_return_to_their_images():
    model, views = small_model(groups=2, weight_local=0).eval(), small_views()
    k, o = model.encode_keys(views).unbind(1)
    for i in range(4):
        alone, original = model.encode_keys({name: x[i:i + 1].repeat(2, 1, 1, 1) for name, x in views.items()
                                             if name in ("second", "original")}).unbind(1)
        torch.testing.assert_close(k[i], alone[0])
        torch.testing.assert_close(o[i], original[0])


def test_bfloat16_does_not_reach_the_losses(monkeypatch):
    """A temperature of 0.05 would magnify the rounding of similarities in a narrow cone."""
    model, views = small_model(), small_views()
    q = F.normalize(1 + 0.1 * torch.randn(4, 6), dim=1)
    keys = F.normalize(1 + 0.1 * torch.randn(4, 2, 6), dim=2)
    stripes = F.normalize(torch.ones(4, 4, 6) + torch.arange(4.0)[:, None], dim=2)
    model.online["head"] = torch.nn.Flatten()                    # so that its parameters are no part of this
    monkeypatch.setattr(model.online["head"], "forward", lambda feature: q)
    monkeypatch.setattr(model, "encode", lambda encoder, head, x: stripes if head == "stripe_head" else keys)
    plain = model(views)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(views)
    for name in ("total", "instance", "global", "local", "accuracy"):
        assert torch.equal(plain[name], mixed[name]), name


def test_batches_that_cannot_be_cut_into_groups_are_named():
    with pytest.raises(RuntimeError, match=r"sizes \[3, -1\] don't multiply up to the size of dim 0 \(4\)"):
        small_model(groups=3)(small_views())


def test_what_is_exported_is_the_online_encoder():
    model = small_model()
    assert model.backbone_for_export() is model.online["backbone"]


def test_collapse_is_flagged_both_ways():
    def logged():
        return {name: value.item() for name, value in model(views).items()}

    model, views = small_model(), small_views()
    healthy = logged()
    assert model.warning(healthy) == ""
    for name in ("feature_std", "query_std"):
        assert model.warning(healthy | {name: math.nan}) == model.warning(healthy | {name: 0.0}) == "COLLAPSE?"
    last = model.online["head"][-1]
    weight = last.weight.detach().clone()
    last.weight.data.zero_()                     # the projection alone: features are as they were
    constant = logged()
    assert constant["query_std"] < 1e-6 and constant["feature_std"] == healthy["feature_std"]
    assert model.warning(constant) == "COLLAPSE?"
    last.weight.data.copy_(weight)
    model.online["backbone"].forward_features = lambda x: torch.ones(len(x), 64, 1, 1)
    constant = logged()
    assert constant["feature_std"] < 1e-6 and model.warning(constant) == "COLLAPSE?"


# ---- how it is trained -----------------------------------------------------------------------


def test_every_number_of_the_recipe_arrives():
    """... where LUPerson's code has it."""
    recipe = UPReIDRecipe(arch="resnet_tiny", size=(64, 32), epochs=4, batch=4, queue=10, groups=2, lr=0.64,
                          momentum=0.7, temperature=0.3, temperature_global=0.2, temperature_local=0.4,
                          weight_global=0.5, weight_local=0.25, hardest=1, dim=9)
    model = recipe.build()
    optimizer = recipe.optimizer(model)
    group, = optimizer.param_groups
    assert model.recipe is recipe and model.groups == model.online["backbone"].bn1.groups == 2
    assert model.queue.shape == (10, 9) and model.online["backbone"].layer4[0].conv2.stride == (2, 2)
    assert isinstance(optimizer, torch.optim.SGD) and group["momentum"] == 0.9 and not group["nesterov"]
    assert group["decay"] == 1 and len(group["params"]) == len(list(model.online.parameters()))
    rates, now = zip(*(recipe.schedule(step, 3) for step in range(12)))   # constant within an epoch, no warm-up
    assert [r["lr"] for r in rates[::3]] == pytest.approx(
        [0.01 * f for f in (1, (2 + 2 ** 0.5) / 4, 0.5, (2 - 2 ** 0.5) / 4)])
    assert rates[0] == rates[2] and rates[0]["weight_decay"] == 1e-4 and {n["momentum"] for n in now} == {0.7}
    assert model.reference == {"ln_queue": math.log(11), "ln_stripes": math.log(2)}
    assert recipe.draw(torch.Generator()) == {} and recipe.build(2).groups == 1


def test_gradients_are_neither_clipped_nor_frozen():
    model = small_model()
    model(small_views())["total"].backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(model.clip_gradients(0), torch.cat([g.flatten() for g in before.values()]).norm())
    assert all(torch.equal(model.get_parameter(n).grad, g) for n, g in before.items())


@pytest.mark.parametrize("change, parts, message", [
    ({"stripes": 5}, 1, "--size 64x32: the height cannot be cut into --stripes 5"),
    ({"stripes": 0}, 1, "cannot be cut into --stripes 0"),
    ({"hardest": 4}, 1, "--hardest 4: an image has 3 other"), ({"hardest": 0}, 1, "--hardest 0: an image has 3 other"),
    ({"groups": 3}, 1, "--batch 4 cannot be cut into --groups 3"),
    ({"groups": 4}, 1, "--groups 4 of at least 2 images"), ({"groups": 0}, 1, "--groups 0 must be a multiple"),
    ({"groups": 2, "batch": 8}, 4, "--groups 2 must be a multiple of 4")])
def test_recipes_that_do_not_fit_together(change, parts, message):
    recipe = UPReIDRecipe(**{"arch": "resnet_tiny", "size": (64, 32), "batch": 4, "queue": 10, "groups": 2} | change)
    with pytest.raises(ValueError, match=message):
        recipe.build(parts)


def test_without_stripes_nothing_is_asked_of_them():
    UPReIDRecipe(arch="resnet_tiny", size=(33, 17), batch=4, groups=1, weight_local=0, stripes=2, hardest=3).build()


@pytest.mark.parametrize("world, micro_batches, groups, leaks", [(1, 1, 1, True), (1, 1, 2, False), (1, 4, 4, True), (8, 1, 8, False),
                                                          (2, 2, 4, False)])
def test_batch_statistics_that_leak_are_warned_of(monkeypatch, capsys, world, micro_batches, groups, leaks):
    """Keys are grouped otherwise than queries unless all processes together have one group."""
    monkeypatch.setattr(upreid, "world_size", lambda: world)
    dataclasses.replace(UPReIDRecipe.preset("synthetic"), groups=groups, queue=10).build(world * micro_batches)
    assert ("share batch statistics" in capsys.readouterr().out) == leaks


def test_presets():
    assert UPReIDRecipe.preset("luperson") == UPReIDRecipe()     # LUPerson's own values
    assert UPReIDRecipe.preset("market1501").queue == 4096 and UPReIDRecipe.preset("synthetic").arch == "resnet_tiny"
    assert UPReIDRecipe.preset("market1501", "resnet_tiny").size == (128, 64)
    for dataset in ("luperson", "market1501", "synthetic"):
        dataclasses.replace(UPReIDRecipe.preset(dataset), queue=10).build()
