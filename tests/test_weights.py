"""Weights files: every format, fabricated with the names and nesting of the real ones; damaged and hostile files."""

import argparse
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import upreid
from augment import IMAGENET_MEAN
from data import InputError
from weights import (ARCHS, ReIDModel, build_backbone, inspect, load_model, load_weights, read_checkpoint, read_file)


def save(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def vit(seed=0, size=(256, 128), arch="vit_mini"):
    torch.manual_seed(seed)
    return build_backbone(arch, size).state_dict()


def resnet(seed=0):
    torch.manual_seed(seed)
    return build_backbone("resnet_tiny").state_dict()


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def dino_head(D=128):
    """What DINO's and iBOT's heads are called."""
    shapes = {"mlp.0.weight": (8, D), "mlp.2.weight": (8, 8), "mlp.4.bias": (4,), "last_layer.weight_g": (9, 1),
              "last_layer.weight_v": (9, 4), "last_layer2.weight_g": (9, 1), "last_layer2.weight_v": (9, 4)}
    return {"head." + k: torch.ones(v) for k, v in shapes.items()}


def ibot(wanted, loss="ibot_loss"):
    """A training file of iBOT or DINO: the teacher is wanted, the student has `module.` and a mask token."""
    student = prefixed("module.", prefixed("backbone.", vit(9)) | dino_head())
    student["module.backbone.masked_embed"] = torch.zeros(1, 128)
    return {"student": student, "teacher": prefixed("backbone.", wanted) | dino_head(), "epoch": 221,
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [
                {"lr": np.float64(1e-3), "weight_decay": np.float32(0.04), "params": [0]}]},
            "args": argparse.Namespace(arch="vit_small", lr=5e-4, global_crops_scale=(0.4, 1.0), norm_in_head=None),
            loss: {"center": torch.zeros(1, 9), "center2": torch.zeros(1, 1, 9)}, "fp16_scaler": {"scale": 65536.0}}


def transreid(state, D=128):
    head = {"classifier.weight": torch.randn(9, D), "bottleneck.weight": torch.rand(D), "bottleneck.bias": torch.zeros(D),
            "bottleneck.running_mean": torch.randn(D), "bottleneck.running_var": torch.rand(D),
            "bottleneck.num_batches_tracked": torch.tensor(5)}
    return prefixed("base.", state | {"fc.weight": torch.zeros(10, D), "fc.bias": torch.zeros(10)}) | head


def moco(wanted):
    head = {f"fc.{i}.{kind}": torch.ones(3) for i in (0, 2) for kind in ("weight", "bias")}
    state = prefixed("module.encoder_q.", wanted | head) | prefixed("module.encoder_k.", resnet(9) | head)
    state |= {"module.queue": torch.zeros(128, 9), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


FORMATS = {  # name: (kind of backbone, file made of its state, what is said of it)
    "PersonViT / iBOT training": ("vit", ibot, "iBOT's training state, as PersonViT's"),
    "DINO training": ("vit", lambda s: ibot(s, "dino_loss"), "DINO's training state"),
    "DINO training, teacher in DDP": ("vit", lambda s: ibot({}, "dino_loss") | {"teacher": prefixed(
        "module.", prefixed("backbone.", s) | dino_head())}, "DINO's training state"),
    "iBOT backbone release": ("vit", lambda s: {"state_dict": s}, "backbone in a wrapper"),
    "DINO or TransReID-SSL release": ("vit", lambda s: s, "bare backbone"),
    "timm ViT": ("vit", lambda s: s | {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10),
                                       "pre_logits.fc.weight": torch.zeros(9, 9)}, "bare backbone"),
    "MSN": ("vit", lambda s: {"target_encoder": prefixed("module.", s), "encoder": vit(9)}, "backbone in a wrapper"),
    "PersonViT / TransReID fine-tuned": ("vit", transreid, "fine-tuned model of TransReID or PersonViT"),
    "... trained with DDP": ("vit", lambda s: prefixed("module.", transreid(s)), "fine-tuned model of TransReID"),
    "torchvision ResNet or LUPerson release": ("resnet", lambda s: s | {
        "fc.weight": torch.zeros(10, 1024), "fc.bias": torch.zeros(10)}, "bare backbone"),
    "old ResNet without counters": ("resnet", lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
                                    "bare backbone"),
    "MoCo / LUPerson training": ("resnet", moco, "MoCo's or LUPerson's training state"),
    "ours, backbone": ("vit", lambda s: {"format": "reid-backbone", "recipe": {"arch": "vit_mini"}, "size": (256, 128),
                                         "mean": [0.1] * 3, "std": [0.2] * 3, "epoch": 7, "backbone": s},
                       "pre-trained backbone of this project"),
    "ours, fine-tuned": ("vit", lambda s: {"format": "reid-model", "recipe": {
        "arch": "vit_mini", "size": (256, 128), "neck_feat": "after", "last_stride": 1, "mean": [0.1] * 3,
        "std": [0.2] * 3}, "model": {k: v for k, v in transreid(s).items() if ".fc." not in k}},
        "fine-tuned model of this project"),
    "ours, PersonViT training": ("vit", lambda s: {"format": "reid-checkpoint", "step": 3, "bad": [], "model": {
        **prefixed("student.backbone.", vit(9)), **prefixed("teacher.backbone.", s), "center": torch.zeros(3)}},
        "training state of this project"),
    "ours, UP-ReID training": ("resnet", lambda s: {"format": "reid-checkpoint", "step": 3, "model": {
        **prefixed("online.backbone.", s), **prefixed("momentum.backbone.", resnet(9)), "queue": torch.zeros(3, 4)}},
        "training state of this project"),
    "compiled": ("resnet", lambda s: prefixed("_orig_mod.", s), "bare backbone"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_and_can_be_evaluated(tmp_path, name):
    kind, wrap, words = FORMATS[name]
    state = {"vit": vit, "resnet": resnet}[kind]()
    path = save(tmp_path, wrap(state))
    net = build_backbone({"vit": "vit_mini", "resnet": "resnet_tiny"}[kind])
    said = load_weights(path, net)
    assert words in said and f"{len(state)}/{len(state)} backbone weights" in said and "resized: none" in said
    filled = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
    assert all(torch.equal(v, state[k]) for k, v in filled.items())
    assert words in inspect(path)
    if "training state of this project" in words:
        with pytest.raises(InputError, match="evaluate the model.pth or backbone.pth beside it"):
            load_model(path)
        return
    model, recipe = load_model(path)
    x = torch.randn(2, 3, *recipe["size"])
    fine_tuned = "fine-tuned" in name or "DDP" in name and kind == "vit" and "DINO" not in name
    assert isinstance(model, ReIDModel) == fine_tuned and not model.training
    with torch.no_grad():
        plain = net.eval()(x)
        torch.testing.assert_close(model(x), model.bottleneck(plain) if name == "ours, fine-tuned" else plain)
    half = fine_tuned or name == "timm ViT"
    wanted = [0.1] * 3 if name in ("ours, backbone", "ours, fine-tuned") else [0.5] * 3 if half else list(IMAGENET_MEAN)
    assert list(recipe["mean"]) == wanted


def test_the_bottleneck_of_foreign_models_is_read(tmp_path):
    content = transreid(vit())
    model, recipe = load_model(save(tmp_path, content))
    assert recipe["neck_feat"] == "before" and model.classifier.out_features == 9
    assert torch.equal(model.bottleneck.running_mean, content["bottleneck.running_mean"])


def test_torchvision_resnet50_and_vit_small(tmp_path):
    import torchvision
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    ours = upreid.resnet50()
    assert "dropped: 2 (fc.weight, fc.bias)" in load_weights(save(tmp_path, theirs), ours)
    assert torch.equal(ours.layer4[2].conv3.weight, theirs["layer4.2.conv3.weight"])
    for arch in ARCHS:
        assert read_file(save(tmp_path, build_backbone(arch).state_dict())).arch == arch


def test_statistics_of_timm_and_deit(tmp_path):
    """Both have a classifier called head; DeiT's lies in a file that is nested."""
    flat = vit() | {"head.weight": torch.zeros(5, 128), "head.bias": torch.zeros(5)}
    assert read_file(save(tmp_path, flat)).statistics == ((0.5,) * 3, (0.5,) * 3)
    assert read_file(save(tmp_path, {"model": flat})).statistics[0][0] == pytest.approx(0.485)


def test_distilled_deit_loses_its_second_token(tmp_path):
    state = vit(size=(224, 224))
    pos = torch.randn(1, 198, 128)
    content = state | {"pos_embed": pos, "dist_token": torch.zeros(1, 1, 128), "head_dist.weight": torch.zeros(3, 128)}
    model, _ = load_model(save(tmp_path, content))
    assert torch.equal(model.pos_embed, torch.cat([pos[:, :1], pos[:, 2:]], 1))


@pytest.mark.parametrize("key, words", [("part_token1", "part tokens of PASS"), ("base.sie_embed", "camera embedding"),
                                        ("b1.0.norm1.weight", "local branches"),
                                        ("patch_embed.conv.0.weight", "convolutional stem")])
def test_backbones_with_other_parts_are_refused(tmp_path, key, words):
    content = (vit() if key.startswith("pa") else prefixed("base.", vit())) | {key: torch.zeros(3)}
    with pytest.raises(InputError, match=words):
        load_weights(save(tmp_path, content), build_backbone("vit_mini"))


def test_stride_and_neck_of_fine_tuned_resnets(tmp_path):
    """Ours say theirs; of foreign ones bag of tricks ranks behind the neck."""
    model = ReIDModel(build_backbone("resnet_tiny", last_stride=2), 9, "before")
    recipe = {"arch": "resnet_tiny", "size": [64, 32], "last_stride": 2, "neck_feat": "before", "mean": [0.5] * 3,
              "std": [0.5] * 3}
    content = {"format": "reid-model", "recipe": recipe, "model": model.state_dict()}
    loaded, found = load_model(save(tmp_path, content))
    assert loaded.base.layer4[0].conv2.stride == (2, 2) and found["neck_feat"] == "before"
    loaded, found = load_model(save(tmp_path, model.state_dict()))
    assert found["neck_feat"] == "after" and found["mean"] == list(IMAGENET_MEAN)


def huge():
    return torch.zeros(1).expand(1, 40000 ** 2 + 1, 128)


@pytest.mark.parametrize("change", [
    {"pos_embed": huge}, {"cls_token": lambda: torch.tensor(1.0)}, {"patch_embed.proj.weight": lambda: torch.tensor(1.0)},
    {"patch_embed.proj.weight": lambda: torch.zeros(128, 3, 16, 0)}, {"blocks.0.mlp.fc1.weight": lambda: torch.tensor(1.0)},
    {"norm.weight": lambda: torch.ones(128, dtype=torch.int8)}, {"norm.weight": lambda: torch.ones(128).to_sparse()},
    {"norm.weight": lambda: torch.full((128,), math.nan)}, {"dist_token": lambda: torch.zeros(1), "pos_embed": lambda: torch.zeros(3)}])
def test_odd_tensors_get_one_line(tmp_path, change):
    path = save(tmp_path, vit() | {key: make() for key, make in change.items()})
    for action in (lambda: load_weights(path, build_backbone("vit_mini")), lambda: load_model(path)):
        with pytest.raises(InputError, match="w.pth: ") as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"size": 3}, {"size": [10 ** 6, 10 ** 6]}, {"size": [32]}, {"mean": 3}, {"std": None},
                                    {"mean": ["a"] * 3}, {"std": [0, 1, 1]}, {"last_stride": "x"}, {"neck_feat": 7}])
def test_nonsense_in_a_recipe_gets_one_line(tmp_path, change):
    recipe = {"arch": "resnet_tiny", "size": [64, 32], "last_stride": 1, "neck_feat": "before", "mean": [0.5] * 3,
              "std": [0.5] * 3}
    content = {"format": "reid-backbone", "recipe": recipe | change, "backbone": resnet()}
    with pytest.raises(InputError, match="damaged, its size, mean, std"):
        load_model(save(tmp_path, content))


def test_a_file_that_holds_itself_ends(tmp_path):
    content: dict = {}
    content["model"] = content
    with pytest.raises(InputError, match="holds no weights of a backbone under a name known here, first model"):
        load_weights(save(tmp_path, content), build_backbone("vit_mini"))


def test_broken_heads_are_refused(tmp_path):
    content = transreid(vit())
    content["bottleneck.running_mean"][0] = math.nan
    with pytest.raises(InputError, match="first bottleneck.running_mean"):
        load_model(save(tmp_path, content))


def test_inspect_shows_the_arguments_of_a_training_file(tmp_path):
    text = inspect(save(tmp_path, ibot(vit())))
    for words in ("vit_mini, 78 tensors", "16x8 patches at stride 16, image 256x128 (inferred", "epoch     221",
                  "args.global_crops_scale = (0.4, 1.0)", "args.lr = 0.0005", "mean (0.485"):
        assert words in text, text
    for content, words in (({"epoch": 3}, "first epoch"), ({}, "first nothing")):
        with pytest.raises(InputError, match=f"no weights of a backbone under a name known here, {words}"):
            inspect(save(tmp_path, content))


@pytest.mark.parametrize("size, stride, words", [
    ((256, 128), 16, "none"), ((384, 128), 16, "24x8 -> 16x8"), ((256, 128), 12, "21x10 -> 16x8"),
    ((224, 224), 16, "14x14 -> 16x8"), ((128, 64), 16, "8x4 -> 16x8"), ((192, 96), 16, "12x6 -> 16x8"),
    ((48, 48), 16, "3x3 -> 16x8"), ((224, 224), 12, "18x18 -> 16x8")])
def test_position_grids_of_foreign_files(tmp_path, size, stride, words):
    """Sizes in use are recognised by the number of patches; others are square or twice as tall as wide."""
    source = build_backbone("vit_mini", size, stride=stride)
    path = save(tmp_path, source.state_dict())
    assert f"resized: pos_embed {words}" in load_weights(path, build_backbone("vit_mini")).replace(": none", ": pos_embed none")
    file = read_file(path)
    assert (file.size, file.stride, file.grid, file.arch) == (size, stride, source.grid, "vit_mini")
    model, recipe = load_model(path)                             # at its own size nothing is resized
    assert recipe["size"] == size and torch.equal(model.pos_embed, source.pos_embed)


def test_position_grids_of_our_files(tmp_path):
    """They say their size."""
    for size, words in (((384, 128), "24x8 -> 16x8"), ((128, 256), "8x16 -> 16x8")):  # the last with as many tokens
        content = {"format": "reid-backbone", "recipe": {"size": list(size)},
                   "backbone": build_backbone("vit_tiny", size).state_dict()}
        assert words in load_weights(save(tmp_path, content), build_backbone("vit_tiny"))
    source = build_backbone("vit_tiny").state_dict()
    for pos in (torch.zeros(1, 199, 192), torch.zeros(1, 1, 192), torch.zeros(192), torch.zeros(2, 129, 192),
                torch.zeros(1, 0, 192)):
        with pytest.raises(InputError, match="pos_embed of shape"):
            load_weights(save(tmp_path, source | {"pos_embed": pos}), build_backbone("vit_tiny"))


def test_deeper_networks_and_broken_numbers_are_refused(tmp_path):
    deep = upreid.ResNet((1, 1, 2, 1), 32).state_dict()
    with pytest.raises(InputError, match="blocks that this one lacks .too many: layer3.1"):
        load_weights(save(tmp_path, deep), upreid.resnet_tiny())
    for value in (math.nan, 1j):
        state = upreid.resnet_tiny().state_dict()
        state["conv1.weight"] = state["conv1.weight"] * value
        with pytest.raises(InputError, match="1 weights are not finite floating-point numbers, first conv1.weight"):
            load_weights(save(tmp_path, state), upreid.resnet_tiny())


def test_damaged_models_get_one_line(tmp_path):
    model = ReIDModel(build_backbone("resnet_tiny"), 5)
    recipe = {"arch": "resnet_tiny", "size": [32, 16], "last_stride": 1, "neck_feat": "before",
              "mean": [0.5] * 3, "std": [0.5] * 3}
    good = {"format": "reid-model", "recipe": recipe, "model": model.state_dict()}
    loaded, _ = load_model(save(tmp_path, good))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    for change in ({"recipe": None}, {"recipe": {}}, {"model": {}}, {"model": 3}, {"recipe": recipe | {"size": 3}},
                   {"recipe": recipe | {"neck_feat": "behind"}}):
        with pytest.raises(InputError):
            load_model(save(tmp_path, good | change))


def test_wrong_weights_are_refused_and_change_nothing(tmp_path):
    net = build_backbone("vit_tiny", (128, 64))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = build_backbone("vit_tiny", (128, 64)).state_dict()
    del small["blocks.3.attn.qkv.weight"]
    for content, words in [(upreid.resnet_tiny().state_dict(), "another architecture.*backbone: resnet_tiny"),
                           (build_backbone("vit_small", (128, 64)).state_dict(), "another shape.*backbone: vit_small"),
                           (small, "1 of 150 backbone weights missing.*missing blocks.3.attn.qkv.weight"),
                           ({"epoch": 3}, "holds no weights of a backbone"), ([1, 2], "holds a list")]:
        with pytest.raises(InputError, match=words):
            load_weights(save(tmp_path, content), net)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_damaged_and_hostile_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = save(tmp_path, {"a": torch.randn(1000)}).read_bytes()
    rng = random.Random(0)
    cases = {"empty": b"", "text": b"hello " * 99, "half": good[:len(good) // 2], "short": good[:-50],
             "noise": rng.randbytes(5000), "pickle": pickle.dumps(Hostile()),
             "json": b'{"model": 1}', "zip": b"PK\x03\x04" + rng.randbytes(300)}
    torch.save({"x": Hostile()}, "hostile.pth")
    cases["zipped pickle"] = Path("hostile.pth").read_bytes()
    for name, content in cases.items():
        Path(name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_checkpoint(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such weights file"):
        read_checkpoint("absent.pth")
    with pytest.raises(InputError, match="is a folder; name the model.pth"):
        read_checkpoint(tmp_path)
    assert not Path("executed").exists()


def test_a_network_without_a_name_is_no_model(tmp_path):
    with pytest.raises(InputError, match="its backbone is none of vit_mini"):
        load_model(save(tmp_path, upreid.ResNet((1, 1, 2, 1), 32).state_dict()))
