"""Weights files: every format, fabricated with the names and nesting of the real ones; damaged and hostile files."""

import argparse
import collections
import enum
import functools
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import upreid
from data import IMAGENET_MEAN, LUP_MEAN, LUP_STD
from evaluate import ARCHS, ReIDModel, build_backbone, load_model, load_weights
from extra import formats
from extra.files import InputError
from extra.formats import read_checkpoint, read_weights


def inspect(path):
    return formats.describe(path, read_weights(path))


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


def numbered(state):
    """A ResNet's names in a nn.Sequential of its children, without the classifier."""
    names = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {re.sub(r"^\w+", lambda m: names[m[0]], k): v for k, v in state.items() if not k.startswith("fc.")}


def mae(state):
    names = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight", "decoder_pred.weight")
    return {"model": state | ones(*names), "optimizer": {"state": {}}, "epoch": 3, "scaler": {"scale": 3.0},
            "args": argparse.Namespace(output_dir=Path("here"))}


def neck(prefix, D=1024):
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {prefix + kind: torch.rand(D) for kind in kinds} | {prefix + "num_batches_tracked": torch.tensor(5)}


FORMATS = {  # name: (kind of backbone, file made of its state, what is said of it)
    "PersonViT / iBOT training": ("vit", ibot, "iBOT's training state, as PersonViT's"),
    "DINO training": ("vit", lambda s: ibot(s, "dino_loss"), "DINO's training state"),
    "DINO training, teacher in DDP": ("vit", lambda s: ibot({}, "dino_loss") | {"teacher": prefixed(
        "module.", prefixed("backbone.", s) | dino_head())}, "DINO's training state"),
    "iBOT backbone release": ("vit", lambda s: {"state_dict": s}, "backbone under state_dict."),
    "DINO or TransReID-SSL release": ("vit", lambda s: s, "bare backbone"),
    "timm ViT": ("vit", lambda s: s | {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10),
                                       "pre_logits.fc.weight": torch.zeros(9, 9)}, "bare backbone"),
    "MSN": ("vit", lambda s: {"target_encoder": prefixed("module.", s), "encoder": vit(9)}, "under target_encoder."),
    "PersonViT / TransReID fine-tuned": ("vit", transreid, "fine-tuned model of TransReID or PersonViT"),
    "... trained with DDP": ("vit", lambda s: prefixed("module.", transreid(s)), "fine-tuned model of TransReID"),
    "torchvision ResNet or LUPerson release": ("resnet", lambda s: s | {
        "fc.weight": torch.zeros(10, 1024), "fc.bias": torch.zeros(10)}, "bare backbone"),
    "old ResNet without counters": ("resnet", lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
                                    "bare backbone"),
    "MoCo / LUPerson training": ("resnet", moco, "MoCo's or LUPerson's training state"),
    "ours, backbone": ("vit", lambda s: {"format": "reid-backbone", "recipe": {"arch": "vit_mini"}, "size": (256, 128),
                                         "mean": [0.1] * 3, "std": [0.2] * 3, "epoch": 7, "backbone": s},
                       "backbone of this project"),
    "ours, fine-tuned": ("vit", lambda s: {"format": "reid-model", "recipe": {
        "arch": "vit_mini", "size": (256, 128), "neck_feat": "after", "last_stride": 1, "mean": [0.1] * 3,
        "std": [0.2] * 3}, "model": {k: v for k, v in transreid(s).items() if ".fc." not in k}},
        "model of this project"),
    "ours, PersonViT training": ("vit", lambda s: {"format": "reid-checkpoint", "step": 3, "bad": [], "model": {
        **prefixed("student.backbone.", vit(9)), **prefixed("teacher.backbone.", s), "center": torch.zeros(3)}},
        "training state of this project"),
    "ours, ViT in training": ("vit", lambda s: {"format": "reid-checkpoint", "step": 3, "model": {
        k: v for k, v in transreid(s).items() if ".fc." not in k}}, "training state of this project"),
    "ours, UP-ReID training": ("resnet", lambda s: {"format": "reid-checkpoint", "step": 3, "model": {
        **prefixed("online.backbone.", s), **prefixed("momentum.backbone.", resnet(9)), "queue": torch.zeros(3, 4)}},
        "training state of this project"),
    "compiled": ("resnet", lambda s: prefixed("_orig_mod.", s), "bare backbone"),
    "HAP, pre-trained": ("vit", mae, "backbone under model."),
    "MAE": ("vit", mae, "backbone under model."),
    "MoCo v3": ("vit", lambda s: {"arch": "vit_base", "state_dict": prefixed("module.base_encoder.", s | ones(
        "head.0.weight", "head.1.running_mean")) | prefixed("module.momentum_encoder.", vit(9) | ones("head.0.weight"))
        | ones("module.predictor.0.weight")}, "backbone under state_dict.base_encoder."),
    "CION, plain ViT": ("vit", lambda s: {"teacher": prefixed("backbone.", s) | dino_head(), "student": prefixed(
        "module.backbone.", vit(9)) | prefixed("module.", dino_head()), "Loss": {"center": torch.zeros(1, 9)}},
        "backbone under teacher.backbone."),
    "CION, ResNet": ("resnet", lambda s: {"teacher": prefixed("module.backbone.", s) | prefixed("module.", dino_head()),
                     "student": prefixed("module.backbone.", resnet(9)), "Loss": {"center": torch.zeros(1, 9)}},
                     "backbone under teacher.backbone."),
    "LUPerson-NL": ("resnet", lambda s: {"epoch": 89, "state_dict": prefixed("module.encoder_q.", s | ones(
        "fc1.weight", "fc2.weight", "embed_fc.weight", "classifier.weight", "classifier.bias")) | prefixed(
        "module.encoder_k.", resnet(9)) | ones("module.queue", "module.queue_id", "module.prototypes")}, "MoCo's or LUPerson's"),
    "VISSL": ("resnet", lambda s: {"classy_state_dict": {"base_model": {"model": {
        "trunk": prefixed("base_model._feature_blocks.", s), "heads": ones("0.clf.0.weight")}, "meta": {}},
        "optimizer": {"state": {}}, "train_phase_idx": 3}}, "_feature_blocks."),
    "solo-learn": ("resnet", lambda s: {"state_dict": prefixed("backbone.", s) | prefixed("momentum_backbone.", resnet(9)) | ones(
        "projector.0.weight", "momentum_projector.0.weight", "predictor.0.weight", "classifier.weight",
        "momentum_classifier.weight")}, "backbone under state_dict.backbone."),
    "lightly": ("resnet", lambda s: {"state_dict": prefixed("backbone.", numbered(s)) | ones(
        "projection_head.layers.0.weight", "projection_head_momentum.layers.0.weight") | prefixed(
        "backbone_momentum.", numbered(resnet(9)))}, "backbone under state_dict.backbone."),
    "ResNet in a nn.Sequential": ("resnet", numbered, "bare backbone"),
    "torchreid": ("resnet", lambda s: {"state_dict": prefixed("module.", s | ones("classifier.weight", "classifier.bias")),
                                       "epoch": 60, "rank1": 0.9}, "backbone under state_dict."),
    "cluster-contrast, fine-tuned": ("resnet", lambda s: {"state_dict": prefixed("module.", prefixed("base.", numbered(
        s)) | neck("feat_bn.") | {"classifier.weight": torch.ones(9, 1024)}), "best_mAP": 0.5}, "of a strong baseline"),
    "strong baseline, fine-tuned": ("resnet", lambda s: prefixed("base.", s) | neck("bottleneck.") | {
        "classifier.weight": torch.ones(9, 1024)}, "of a strong baseline"),
    "compiled in DDP, fine-tuned": ("vit", lambda s: {k.replace("base.", "base._orig_mod."): v for k, v in prefixed(
        "module.", transreid(s)).items()}, "fine-tuned model of TransReID"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_and_can_be_evaluated(tmp_path, name):
    kind, wrap, words = FORMATS[name]
    state = {"vit": vit, "resnet": resnet}[kind]()
    path = save(tmp_path, wrap(state))
    net = build_backbone({"vit": "vit_mini", "resnet": "resnet_tiny"}[kind])
    said = load_weights(path, net)
    assert words in said and "resized" not in said and "weights loaded" in said
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
    if kind == "resnet":                                         # as torchvision's, but for projects that take 1
        net = build_backbone("resnet_tiny", last_stride=1 if fine_tuned or "CION" in name else 2)
        load_weights(path, net)
    after = name == "ours, fine-tuned" or fine_tuned and kind == "resnet"
    with torch.no_grad():
        plain = net.eval()(x)
        torch.testing.assert_close(model(x), model.bottleneck(plain) if after else plain)
    half = fine_tuned and kind == "vit" or name == "timm ViT"
    wanted = [0.1] * 3 if name in ("ours, backbone", "ours, fine-tuned") else [0.5] * 3 if half else list(IMAGENET_MEAN)
    assert list(recipe["mean"]) == wanted


def test_the_bottleneck_of_third_party_models_is_read(tmp_path):
    content = transreid(vit())
    model, recipe = load_model(save(tmp_path, content))
    assert recipe["neck_feat"] == "before" and isinstance(model.classifier, torch.nn.Identity)
    assert torch.equal(model.bottleneck.running_mean, content["bottleneck.running_mean"])


def test_torchvision_resnet50_and_vit_small(tmp_path):
    import torchvision
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    ours = upreid.resnet50()
    assert "dropped: 2 (fc.weight, fc.bias)" in load_weights(save(tmp_path, theirs), ours)
    assert torch.equal(ours.layer4[2].conv3.weight, theirs["layer4.2.conv3.weight"])
    for arch in ARCHS:
        assert read_weights(save(tmp_path, build_backbone(arch).state_dict()))["recipe"]["arch"] == arch


def test_statistics_of_timm_and_deit(tmp_path):
    """Both have a classifier called head; DeiT's lies in a file that is nested."""
    flat = vit() | {"head.weight": torch.zeros(5, 128), "head.bias": torch.zeros(5)}
    assert read_weights(save(tmp_path, flat))["recipe"]["std"] == [0.5] * 3
    assert read_weights(save(tmp_path, {"model": flat}))["recipe"]["mean"][0] == pytest.approx(0.485)


def more_positions(state, n):
    pos = state["pos_embed"]
    return {"pos_embed": torch.cat([pos[:, :1], torch.ones(1, n, 128), pos[:, 1:]], 1)}


def ones(*names):
    return {name: torch.ones(1, 1, 128) for name in names}


FASTREID = ones("heads.bottleneck.0.weight", "heads.bottleneck.0.running_mean") | {
    "heads.weight": torch.ones(9, 1024), "pixel_mean": torch.full((1, 3, 1, 1), 255 / 2),
    "pixel_std": torch.full((1, 3, 1, 1), 255 / 4)}
UNLIKE = {  # what is said of parts, and the file made of a backbone's state that has them
    "a distillation token (dist_token)": lambda s: s | more_positions(s, 1) | ones("dist_token", "head_dist.weight"),
    "register tokens (reg_token)": lambda s: s | more_positions(s, 4) | {"reg_token": torch.ones(1, 4, 128)},
    "register tokens (register_tokens)": lambda s: {"teacher": prefixed("backbone.", s | {
        "register_tokens": torch.ones(1, 4, 128)}), "student": prefixed("backbone.", vit(9))},
    "part tokens (PASS) (part_token1, part_token2, part_token3, ...)": lambda s: s | ones(
        *(f"part_token{i}" for i in (1, 2, 3))) | {"pos_embed": s["pos_embed"][:, 1:], "cls_pos": s["pos_embed"][:, :1]},
    "a camera embedding (SIE) (sie_embed)": lambda s: prefixed("base.", s | ones("sie_embed")),
    "local branches (JPM, MGN) (b1.0.norm1.weight, bottleneck_1.weight)": lambda s: prefixed("base.", s) | ones(
        "b1.0.norm1.weight", "bottleneck_1.weight"),
    "another stem (patch_embed.conv.0.weight)": lambda s: s | ones("patch_embed.conv.0.weight"),
    "a norm before or behind the blocks (norm_pre.weight)": lambda s: s | ones("norm_pre.weight"),
    "a norm before or behind the blocks (fc_norm.weight)": lambda s: {"model": s | ones("fc_norm.weight", "head.weight")},
    "LayerScale (blocks.0.ls1.gamma)": lambda s: s | ones("blocks.0.ls1.gamma"),
    "another attention (blocks.0.attn.q_norm.weight)": lambda s: s | ones("blocks.0.attn.q_norm.weight"),
    "other blocks (IBN, SE, non-local) (layer1.0.se.fc.0.weight)": lambda s: resnet() | ones("layer1.0.se.fc.0.weight"),
    "other blocks (IBN, SE, non-local) (blocks.0.adapter.fc.weight)": lambda s: s | ones("blocks.0.adapter.fc.weight"),
    "another pooling (heads.pool_layer.p)": lambda s: {"model": prefixed("backbone.", resnet()) | ones(
        "heads.pool_layer.p", "heads.weight")},
    "another pooling (gem.p)": lambda s: resnet() | {"gem.p": torch.tensor([3.0])},
    "another pooling (gap.p)": lambda s: {"state_dict": prefixed("module.base.", numbered(resnet())) | {
        "module.gap.p": torch.tensor([3.0])}},
    "another project's neck (heads.bottleneck.0.weight, heads.bottleneck.0.running_mean)":
        lambda s: {"model": prefixed("backbone.", resnet()) | FASTREID},
    "another project's neck (classifier.add_block.0.weight)": lambda s: prefixed("model.", resnet()) | ones(
        "classifier.add_block.0.weight"),
    "another project's neck (b1_head.bottleneck.0.weight)": lambda s: {"model": prefixed("backbone.", resnet()) | ones(
        "b1_head.bottleneck.0.weight", "b1_head.weight")},
    "another project's neck (bottleneck.0.weight)": lambda s: prefixed("base.", resnet()) | ones("bottleneck.0.weight"),
    "parts unknown here (fc.0.weight, fc.1.running_mean)": lambda s: {"state_dict": resnet() | ones(
        "fc.0.weight", "fc.1.running_mean", "classifier.weight")},
    "parts unknown here (adapter.weight)": lambda s: s | ones("adapter.weight")}


@pytest.mark.parametrize("words", UNLIKE)
def test_parts_that_change_the_feature(tmp_path, words):
    """Such a network is not evaluated without them; a training may start from the rest, and is told."""
    path = save(tmp_path, UNLIKE[words](vit()))
    file = read_weights(path)
    arch = "vit_mini" if file["grid"] else "resnet_tiny"
    state, net = vit() if file["grid"] else resnet(), build_backbone(arch)
    with pytest.raises(InputError, match=re.escape(f"its network, {arch} with {words}, is none that can be evaluated")):
        load_model(path)
    assert f"WITHOUT {words}, which change its feature" in load_weights(path, net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert words in inspect(path)
    assert file["recipe"]["mean"] == ([0.5] * 3 if "heads.bottleneck" in words else list(IMAGENET_MEAN))


def test_parts_that_do_not_change_the_feature(tmp_path):
    """Heads, classifiers, twins, queues and optimisers go, and the feature is the same without them."""
    names = ["head.weight", "head.mlp.0.weight", "head.last_layer.weight_g", "head_dist.weight", "classifier.weight",
             "fc.weight", "fc.0.weight", "fc.2.bias", "pre_logits.fc.weight", "projector.0.weight", "projection_head.weight",
             "predictor.1.running_mean", "prototypes.weight", "decoder_embed.weight", "decoder_blocks.0.norm1.weight",
             "decoder_pos_embed", "mask_token", "masked_embed", "queue", "queue_ptr", "center", "criterion.centers",
             "ibot_loss.center2", "optimizer.state.0.exp_avg", "lr_scheduler.x", "fp16_scaler.scale"]
    twins = {k: v for twin in ("student.", "module.encoder_k.", "momentum_encoder.", "ema.", "model_ema.")
             for k, v in prefixed(twin, vit(9) | ones("head.0.weight")).items()}
    state, x = vit(), torch.randn(2, 3, 256, 128)
    plain, _ = load_model(save(tmp_path, state))
    for prefix in ("", "net.", "module.backbone."):
        # a classifier lies before layers of fc only in torchreid's files, which are refused
        parts = ones(*(n for n in names if n != "classifier.weight")) | {"classifier.bias": torch.ones(9)}
        path = save(tmp_path, prefixed(prefix, state | parts) | parts | twins)
        assert len(read_weights(path)["dropped"]) == len(parts) * (2 if prefix else 1) + len(twins)
        with torch.no_grad():
            assert torch.equal(load_model(path)[0](x), plain(x))


@pytest.mark.parametrize("steps", [["module", "_orig_mod"], ["_orig_mod", "module"], ["state_dict", "model", "backbone"],
                                   ["model", "module", "_orig_mod", "base"], ["net", "encoder"], ["teacher", "_orig_mod", "backbone"]])
def test_prefixes_and_wrappers_in_any_order(tmp_path, steps):
    state = vit()
    for nested in range(len(steps) + 1):                         # the first so many as dictionaries, the others as names
        content = prefixed("".join(f"{step}." for step in steps[nested:]), state)
        for step in reversed(steps[:nested]):
            content = {step: content, "epoch": 3}
        net = build_backbone("vit_mini")
        load_weights(save(tmp_path, content), net)
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_two_networks_of_equal_right_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds 2 networks, under a., b.; save the one that you mean"):
        load_model(save(tmp_path, {"a": vit(), "b": vit(9)}))


def test_a_fine_tuned_model_without_classifier_is_whole(tmp_path):
    whole, x = transreid(vit()), torch.randn(2, 3, 256, 128)
    own = {"format": "reid-model", "model": {k: v for k, v in whole.items() if ".fc." not in k}, "recipe": {
        "arch": "vit_mini", "size": (256, 128), "neck_feat": "after", "mean": [0.5] * 3, "std": [0.5] * 3}}
    wanted, _ = load_model(save(tmp_path, own))
    del own["model"]["classifier.weight"], whole["classifier.weight"]
    for content in (own, whole):
        model, recipe = load_model(save(tmp_path, content))
        assert isinstance(model.classifier, torch.nn.Identity) and isinstance(model, ReIDModel)
        model.neck_feat = "after"
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted(x))
    del own["model"]["bottleneck.running_var"]
    with pytest.raises(InputError, match="bottleneck.running_var is absent there"):
        load_model(save(tmp_path, own))


def safetensors(tensors: dict) -> bytes:
    """As the package of that name writes them."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(blob), len(blob) + len(content)]}
        blob += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("make", [vit, resnet, lambda: transreid(vit()), lambda: prefixed("module.backbone.", vit())])
def test_safetensors_are_what_the_same_pth_is(tmp_path, name, make):
    content, path = make(), tmp_path / name
    path.write_bytes(safetensors(content))
    a, b = (load_model(p) for p in (path, save(tmp_path, content)))
    assert a[1] == b[1] and all(torch.equal(v, b[0].state_dict()[k]) for k, v in a[0].state_dict().items())


def test_half_precision(tmp_path):
    state, x = vit(), torch.randn(1, 3, 256, 128)
    wanted = load_model(save(tmp_path, state))[0](x)
    for dtype in (torch.float16, torch.bfloat16):
        (tmp_path / "h.safetensors").write_bytes(safetensors({k: v.to(dtype) for k, v in state.items()}))
        model, _ = load_model(tmp_path / "h.safetensors")
        torch.testing.assert_close(model(x), wanted, rtol=0.1, atol=0.1)
        assert model.norm.weight.dtype == torch.float32


def test_damaged_safetensors_get_one_line(tmp_path):
    rng, path = random.Random(0), tmp_path / "w.safetensors"
    whole, net = safetensors({k: v for k, v in resnet().items() if v.numel() < 2000}), build_backbone("resnet_tiny")
    for case in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            content[rng.randrange(8) if case % 3 == 0 else rng.randrange(len(whole) // 8)] = rng.randrange(256)
        path.write_bytes(bytes(content[:rng.randrange(len(whole))] if case % 5 == 0 else content))
        try:
            load_weights(path, net)
            raise AssertionError("most tensors are missing")
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
def test_a_pipe_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is a pipe or a device; name a file of weights"):
        read_weights(tmp_path / "pipe")


def zipped(*names) -> bytes:
    handle = io.BytesIO()
    with zipfile.ZipFile(handle, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 99)
    return handle.getvalue()


def stored(write) -> bytes:
    handle = io.BytesIO()
    write(handle)
    return handle.getvalue()


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "pointer of git-LFS.*git lfs pull"),
    (b"<!DOCTYPE html><html><title>Sign in</title>", "web page.*download the file again"), (b"\n <html>", "web page"),
    (b"", "is empty.*download it again"), (gzip.compress(b"x" * 99), "archive: unpack it"),
    (zipped("model.pth"), "zip archive of model.pth: unpack it"), (b'{"weight_map": {"a": "b"}}', "JSON text"),
    (stored(lambda f: np.savez(f, a=np.ones(3))), "NumPy archive"), (stored(lambda f: np.save(f, np.ones(3))), "NumPy array"),
    (b"\x89HDF\r\n\x1a\n" + b"x" * 99, "HDF5 file, as Keras writes"),
    (zipped("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "TorchScript program: save its weights alone"),
    (stored(lambda f: torch.save(torch.nn.Linear(2, 2), f)), r"Python objects .torch.nn.*state_dict"),
    (stored(lambda f: torch.save([torch.ones(2)], f)), "holds a list"), (stored(lambda f: torch.save(torch.ones(2), f)), "a Tensor"),
    (stored(lambda f: torch.save(vit(), f))[:5000], "damaged"), (b"hello " * 99, "is no file of PyTorch weights")])
def test_a_refusal_says_what_the_file_is(tmp_path, content, words):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    for action in (lambda: load_weights(path, build_backbone("vit_mini")), lambda: load_model(path), lambda: inspect(path)):
        with pytest.raises(InputError, match=f"w.pth: .*{words}") as caught:
            action()
        assert "\n" not in str(caught.value) and ("damaged" in str(caught.value)) == ("damaged" in words)


@pytest.mark.parametrize("name, words", [
    ("vit.embeddings.patch_embeddings.projection.weight", "transformers package's: take timm's"),
    ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision's"), ("visual.transformer.resblocks.0.ln_1.weight", "CLIP's"),
    ("layers.0.blocks.0.attn.relative_position_bias_table", r"\(a Swin, as SOLIDER's are\)"),
    ("stages.0.blocks.0.conv_dw.weight", "a network of stages, as Swin or ConvNeXt"),
    ("neck.blocks.0.norm1.weight", "no ViT with a .CLS. token")])
def test_networks_of_other_names(tmp_path, name, words):
    with pytest.raises(InputError, match=words):
        load_model(save(tmp_path, {"state_dict": ones(name)}))


def test_a_class_token_without_a_position(tmp_path):
    """timm adds positions before it prepends [CLS] in some networks: its own is 0 then."""
    state = vit()
    model, _ = load_model(save(tmp_path, state | {"pos_embed": state["pos_embed"][:, 1:]}))
    assert torch.equal(model.pos_embed[:, 1:], state["pos_embed"][:, 1:]) and (model.pos_embed[:, 0] == 0).all()


def test_memory_that_cannot_be_had_is_not_called_damage(tmp_path, monkeypatch):
    path = save(tmp_path, vit())
    for asked, error in ((999, RuntimeError), (10 ** 15, InputError)):   # more than the file has: it claims too much

        def load(*_, **__):
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {asked} bytes.")

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(error, match="damaged" if error is InputError else "allocate memory"):
            load_model(path)


def test_stride_and_neck_of_fine_tuned_resnets(tmp_path):
    """Ours say theirs; of third-party ones bag of tricks ranks behind the neck."""
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
    with pytest.raises(InputError, match="damaged, its tensors or its recipe make no sense"):
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
    for words in ("vit_mini, 78 tensors", "positions of 16x8 patches", "at 256x128", "size=256x128 assumed; stride=16 assumed", "epoch     221",
                  "args.global_crops_scale = (0.4, 1.0)", "args.lr = 0.0005", "mean (0.485"):
        assert words in text, text
    for content, words in (({"epoch": 3}, "first epoch"), ({}, "first nothing")):
        with pytest.raises(InputError, match=f"no weights of a backbone under a name known here, {words}"):
            inspect(save(tmp_path, content))


@pytest.mark.parametrize("size, stride, words", [
    ((256, 128), 16, ""), ((384, 128), 16, "24x8 -> 16x8"), ((256, 128), 12, "21x10 -> 16x8"),
    ((224, 224), 16, "14x14 -> 16x8"), ((128, 64), 16, "8x4 -> 16x8"), ((192, 96), 16, "12x6 -> 16x8"),
    ((48, 48), 16, "3x3 -> 16x8"), ((224, 224), 12, "18x18 -> 16x8")])
def test_position_grids_of_third_party_files(tmp_path, size, stride, words):
    """Sizes in use are recognised by the number of patches; others are square or twice as tall as wide."""
    source = build_backbone("vit_mini", size, stride=stride)
    path = save(tmp_path, source.state_dict())
    assert load_weights(path, build_backbone("vit_mini")).endswith(f"resized {words}" if words else "dropped: 0")
    file = read_weights(path)
    assert (*(file["recipe"][k] for k in ("size", "stride", "arch")), file["grid"]) == (size, stride, "vit_mini", source.grid)
    model, recipe = load_model(path)                             # at its own size nothing is resized
    assert recipe["size"] == size and torch.equal(model.pos_embed, source.pos_embed)


def test_position_grids_of_our_files(tmp_path):
    """They say their size."""
    for size, words in (((384, 128), "24x8 -> 16x8"), ((128, 256), "8x16 -> 16x8")):  # the last with as many tokens
        content = {"format": "reid-backbone", "recipe": {"arch": "vit_tiny", "size": list(size)}, "mean": [0.5] * 3,
                   "std": [0.5] * 3, "backbone": build_backbone("vit_tiny", size).state_dict()}
        assert words in load_weights(save(tmp_path, content), build_backbone("vit_tiny"))
    source = build_backbone("vit_tiny").state_dict()
    for pos in (torch.zeros(1, 199, 192), torch.zeros(1, 1, 192), torch.zeros(192), torch.zeros(2, 129, 192),
                torch.zeros(1, 0, 192)):
        with pytest.raises(InputError, match="pos_embed of shape"):
            load_weights(save(tmp_path, source | {"pos_embed": pos}), build_backbone("vit_tiny"))


def test_deeper_networks_and_broken_numbers_are_refused(tmp_path):
    deep = upreid.ResNet((1, 1, 2, 1), 32).state_dict()
    with pytest.raises(InputError, match="15 of 85 tensors differ, first layer3.1.conv1.weight is .*absent here"):
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
    for content, words in [(upreid.resnet_tiny().state_dict(), "another --arch, resnet_tiny; nothing was loaded: "),
                           (build_backbone("vit_small", (128, 64)).state_dict(), "vit_small; nothing was loaded: 150 of 150 tensors differ.*.1, 1, 384. there and .1, 1, 192. here"),
                           (small, "1 of 150 tensors differ, first blocks.3.attn.qkv.weight is absent there"),
                           ({"epoch": 3}, "holds no weights of a backbone"), ([1, 2], "holds a list")]:
        with pytest.raises(InputError, match=words):
            load_weights(save(tmp_path, content), net)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("change", [{"arch": ["vit_tiny"]}, {"arch": None}, {"size": ["a", "b"]}, {"mean": ["x"] * 3}])
def test_a_recipe_that_makes_no_sense_is_named(tmp_path, change):
    recipe = {"arch": "vit_tiny", "size": (128, 64), "mean": [0.5] * 3, "std": [0.5] * 3}
    weights = build_backbone("vit_tiny", (128, 64)).state_dict()
    with pytest.raises(InputError, match="damaged, its tensors or its recipe make no sense"):
        read_weights(save(tmp_path, {"format": "reid-backbone", "recipe": recipe | change, "backbone": weights}))
    as_text = {"size": [128.0, "64"], "mean": ["0.5"] * 3}       # numbers all the same
    file = read_weights(save(tmp_path, {"format": "reid-backbone", "recipe": recipe | as_text, "backbone": weights}))
    assert file["recipe"]["size"] == (128, 64) and file["recipe"]["mean"] == [0.5] * 3


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    """... where PyTorch, which checks no checksum, reads another number."""
    path = save(tmp_path, build_backbone("vit_tiny", (128, 64)).state_dict())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(InputError, match="damaged, .*a checksum does not match.*; nothing was loaded"):
        read_weights(path)


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
    with pytest.raises(InputError, match="its network, a ResNet of .1, 1, 2, 1. blocks.* is none that can be evaluated here, vit_mini"):
        load_model(save(tmp_path, upreid.ResNet((1, 1, 2, 1), 32).state_dict()))


# ------------------------------------------------------------------------------------------------
# How a file is used: what it says, what its kind implies, what is assumed, what is given
# ------------------------------------------------------------------------------------------------


def fast_reid(state):
    return {"model": prefixed("backbone.", state) | FASTREID}


@pytest.mark.parametrize("wrap, stride, origin", [
    (lambda s: s, 2, "assumed"), (lambda s: {"state_dict": s, "epoch": 3}, 2, "assumed"),
    (lambda s: s | ones("fc.weight", "fc.bias"), 2, "as torchvision's"),
    (lambda s: {"state_dict": s | ones("classifier.weight")}, 2, "as torchreid's resnet50's"),
    (lambda s: s | ones("fc.0.weight", "classifier.weight"), 1, "as torchreid's resnet50_fc512's"),
    (lambda s: prefixed("model.", s | ones("fc.weight")) | ones("classifier.add_block.0.weight"), 2, "as layumi's"),
    (moco, 2, "as MoCo's"), (FORMATS["VISSL"][1], 2, "as MoCo's, LUPerson's and others'"),
    (FORMATS["solo-learn"][1], 2, "as MoCo's, LUPerson's and others'"), (FORMATS["lightly"][1], 2, "as MoCo's"),
    (FORMATS["CION, ResNet"][1], 1, "as CION's"), (fast_reid, 1, "as fast-reid's"),
    (FORMATS["cluster-contrast, fine-tuned"][1], 1, "as cluster-contrast's"),
    (FORMATS["strong baseline, fine-tuned"][1], 1, "as a strong baseline's (WARNING: reid-strong-baseline's own code has no ReLU")])
def test_last_stride_project_by_project(tmp_path, wrap, stride, origin):
    path = save(tmp_path, wrap(resnet()))
    file = read_weights(path)
    assert file["recipe"]["last_stride"] == stride and file["origins"]["last_stride"].startswith(origin)
    assert f"last_stride={stride} {origin}" in inspect(path)
    net = build_backbone("resnet_tiny", last_stride=3 - stride)  # a start of training keeps the recipe's own
    load_weights(path, net)
    assert net.layer4[0].conv2.stride == (3 - stride, 3 - stride)


def test_features_of_torchvisions_network(tmp_path, capsys):
    import torchvision
    theirs = torchvision.models.resnet50(weights=None).eval()
    model, recipe = load_model(save(tmp_path, {"state_dict": theirs.state_dict(), "epoch": 60}))
    said = capsys.readouterr().out
    for words in ("size=256x128 assumed", "last_stride=2 as torchvision's", "norm=imagenet assumed", "--as NAME=VALUE"):
        assert words in said
    theirs.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 256, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more, mean, origin", [
    ({}, IMAGENET_MEAN, "norm=imagenet assumed"),
    (("head.weight", "head.bias"), [0.5] * 3, "norm=half assumed (timm's ViTs; DeiT's look alike: norm=imagenet)"),
    (("head.weight", "head_dist.weight", "dist_token"), IMAGENET_MEAN, "norm=imagenet assumed")])
def test_statistics_of_flat_vits(tmp_path, more, mean, origin):
    """timm's DeiT files look like timm's own ViTs, which take 0.5, and have ImageNet's: what is a guess says so."""
    state = vit() | ones(*more)
    if "dist_token" in state:
        state |= more_positions(state, 1)
    path = save(tmp_path, state)
    assert read_weights(path)["recipe"]["mean"] == list(mean) and origin in inspect(path)


def test_what_is_given_counts(tmp_path, capsys):
    content = prefixed("base.", resnet()) | neck("bottleneck.")
    path = save(tmp_path, content)
    model, recipe = load_model(path, last_stride=2, norm="lup", neck="before", size=(128, 64))
    assert model.base.layer4[0].conv2.stride == (2, 2) and model.neck_feat == "before"
    assert recipe["size"] == (128, 64) and recipe["mean"] == list(LUP_MEAN) and recipe["std"] == list(LUP_STD)
    assert "size=128x64 as given; last_stride=2 as given; neck=before as given; norm=lup as given" in capsys.readouterr().out
    again, found = load_model(path, last_stride="2", norm="lup", neck="before", size="128x64")  # as evaluate.py hands it over
    x = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x)) and found == recipe


def test_what_is_given_counts_for_our_files_too(tmp_path, capsys):
    own = FORMATS["ours, fine-tuned"][1](vit())
    path = save(tmp_path, own)
    load_model(path)
    assert "assumed" not in capsys.readouterr().out and "--as" not in inspect(path)
    model, recipe = load_model(path, norm="half", neck="before", stride=8)
    assert recipe["mean"] == [0.5] * 3 and recipe["neck_feat"] == "before" and model.base.grid == (31, 15)
    assert "pos_embed resized 16x8 -> 31x15" in capsys.readouterr().out
    wide, _ = load_model(path, size=(128, 256))                  # as many patches, but the file says which they are
    assert wide.base.grid == (8, 16) and "resized 16x8 -> 8x16" in capsys.readouterr().out


@pytest.mark.parametrize("made, given, grid, resized", [
    (dict(size=(192, 64)), dict(size=(192, 64)), (12, 4), ""),   # a size that is not in use
    (dict(size=(128, 256)), dict(size="128x256"), (8, 16), ""),  # as many patches as 256x128
    (dict(size=(288, 288)), dict(size="288x288"), (18, 18), ""), # as many as 224x224 at stride 12
    (dict(size=(256, 128)), dict(stride=12), (16, 8), "16x8 -> 21x10"),
    (dict(size=(256, 128), stride=12), dict(stride=12, size="256x128"), (21, 10), ""),
    (dict(size=(160, 96), stride=8), dict(stride=8, size="160x96"), (19, 11), ""),
    (dict(size=(256, 128)), dict(size="384x128"), (16, 8), "16x8 -> 24x8")])
def test_a_vits_grid_when_size_or_stride_is_given(tmp_path, capsys, made, given, grid, resized):
    """What fits the number of positions is what they are of; else they are resized."""
    source = build_backbone("vit_mini", made["size"], stride=made.get("stride"))
    path = save(tmp_path, source.state_dict())
    assert read_weights(path, formats.check_settings(given))["grid"] == grid
    model, recipe = load_model(path, **given)
    assert (f"resized {resized}" in capsys.readouterr().out) == bool(resized)
    if not resized:
        x = torch.randn(1, 3, *recipe["size"])
        with torch.no_grad():
            torch.testing.assert_close(model(x), source.eval()(x))


def test_a_grid_that_is_unknown_names_the_way_out(tmp_path):
    path = save(tmp_path, build_backbone("vit_mini", (192, 64)).state_dict())
    with pytest.raises(InputError, match="fits no grid .* evaluate.py --as size=HEIGHTxWIDTH says which"):
        load_model(path)


@pytest.mark.parametrize("given", [
    {"norm": "foo"}, {"size": "128"}, {"size": (8, 8)}, {"size": "8x8"}, {"size": (128,)}, {"last_stride": 3}, {"neck": "behind"},
    {"stride": 0}, {"stride": 17}, {"mean": 0.5}, {"path": "x"}, {"norm": None}, {"size": "256x128x3"}, {"size": "99999x128"}])
def test_wrong_settings_get_one_line(given):
    (name, _), = given.items()
    with pytest.raises(InputError, match=f"{name}=.* must be one of size=256x128.*norm=imagenet, half or lup"):
        formats.check_settings(given)


@pytest.mark.parametrize("make, name, value", [(resnet, "stride", 12), (vit, "last_stride", 2), (vit, "neck", "after"),
                                               (resnet, "neck", "before")])
def test_settings_that_a_network_does_not_have(tmp_path, make, name, value):
    with pytest.raises(InputError, match=f"{name}={value}: .* has no {name} that could be changed"):
        load_model(save(tmp_path, make()), **{name: value})


def test_settings_on_the_command_line(tmp_path, capsys):
    path = str(save(tmp_path, resnet()))
    evaluate.main(["--inspect", path, "--as", "last_stride=1", "norm=half"])
    assert "last_stride=1 as given; norm=half as given" in capsys.readouterr().out
    picture = str(tmp_path / "a.png")
    Image.new("RGB", (32, 64), (9, 99, 200)).save(picture)
    common = ["--weights", path, "--compare", picture, picture, "--workers", "0", "--device", "cpu", "--as"]
    evaluate.main([*common, "size=64x32"])
    assert "size=64x32 as given; last_stride=2 assumed" in capsys.readouterr().out
    with pytest.raises(InputError, match="norm=foo: must be one of"):
        evaluate.main([*common, "norm=foo"])
    for wrong, words in ((["norm"], "'norm' is not NAME=VALUE"), (["=half"], "is not NAME=VALUE"), ([], "expected at least one argument")):
        with pytest.raises(SystemExit):
            evaluate.main([*common, *wrong])
        assert words in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Files are called what they are
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": prefixed("module.", s), "best_acc1": torch.tensor([75.0]), "optimizer": {}},
    lambda s: {"n_averaged": torch.tensor(9)} | prefixed("module.", s),
    lambda s: {"model": s, "rng_state": torch.get_rng_state(), "steps": torch.arange(5)},
    lambda s: s | {"iteration": torch.tensor(5), "total_ops": torch.zeros(1, dtype=torch.float64)},
    lambda s: {"net": s, "history": torch.rand(50), "extra": {"class_means": torch.rand(9, 9)}},
    lambda s: {"net": s, "history": np.arange(5.0), "rank1": np.float16(0.5), "last": np.float64(3), "dtype": torch.float16, "path": Path("a/b")}])
def test_what_lies_beside_a_network_does_not_matter(tmp_path, wrap):
    state, x = resnet(), torch.randn(1, 3, 64, 32)
    model, _ = load_model(save(tmp_path, wrap(state)))
    plain, _ = load_model(save(tmp_path, state))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


class Settings(dict):
    """As Lightning's AttributeDict and yacs' CfgNode: a dictionary with attributes of its own."""

    def __init__(self, *content):
        super().__init__(*content)
        self.__dict__["immutable"] = True


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("zipped_file", [True, False])
def test_objects_beside_the_weights_are_not_looked_up(tmp_path, zipped_file):
    """Settings of Lightning, fast-reid and others: something stands in for each, and no class is imported."""
    beside = {"hyper_parameters": Settings({"lr": 1, "more": Settings({"a": Settings()})}), "colour": Colour.RED,
              "lists": collections.defaultdict(list), "frozen": frozenset([1]), "counter": collections.Counter("aab")}
    if zipped_file:
        beside["criterion"] = torch.nn.Linear(2, 2)
    path = tmp_path / "last.ckpt"
    torch.save(beside | {"state_dict": resnet()}, path, _use_new_zipfile_serialization=zipped_file)
    content = read_checkpoint(path)
    assert type(content["hyper_parameters"]) is collections.OrderedDict and content["hyper_parameters"]["lr"] == 1
    model, _ = load_model(path)
    assert torch.equal(model.conv1.weight, resnet()["conv1.weight"])


class Whole(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = build_backbone("resnet_tiny")


def follow(error, path):
    """Run the Python that a refusal names; the path of what it saves."""
    code = re.search(r"(?:project's code|if you trust it), (.*); nothing was loaded", str(error))[1]
    new = path.with_name("new.pth")
    exec(code, {"torch": torch, "pickle": pickle, "FILE": path, "NEW": new})
    return new


@pytest.mark.parametrize("content, name", [
    (lambda: Whole(), "Whole"), (lambda: {"model": Whole(), "optimizer": {"x": torch.ones(2)}}, "Whole"),
    (lambda: build_backbone("resnet_tiny"), "ResNet"), (lambda: {"state_dict": Settings(resnet()), "t": collections.deque([1])}, "Settings"),
    (lambda: {"state_dict": resnet(), "meters": collections.deque([1])}, "collections.deque"),
    (lambda: {"model": resnet(), "act": functools.partial(torch.relu)}, "functools.partial")])
def test_objects_that_cannot_be_read_name_a_way_out_that_works(tmp_path, content, name):
    path = save(tmp_path, content())
    for action in (load_model, inspect, read_checkpoint):
        with pytest.raises(InputError, match=f"it holds Python objects .*{name}.*nothing was loaded") as caught:
            action(path)
        assert "damaged" not in str(caught.value)
    model, _ = load_model(follow(caught.value, path))
    assert model.embed_dim == 1024


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("make", [lambda s: {"model": {k: v.numpy() for k, v in s.items()}, "__author__": "x"}, lambda s: s,
                                  lambda s: {"state_dict": s, "epoch": 3}])
def test_a_plain_pickle_is_called_that(tmp_path, make, protocol):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(make(resnet()), protocol))
    with pytest.raises(InputError, match="R-50.pkl: is a plain pickle, not torch.save's") as caught:
        load_model(path)
    model, _ = load_model(follow(caught.value, path))
    assert torch.equal(model.conv1.weight, resnet()["conv1.weight"])


def test_arrays_of_numpy_are_read(tmp_path):
    model, _ = load_model(save(tmp_path, {"model": {k: v.numpy() for k, v in resnet().items()}}))
    assert torch.equal(model.conv1.weight, resnet()["conv1.weight"])


def test_a_torchscript_program_names_a_way_out_that_works(tmp_path):
    path = tmp_path / "program.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                          # it is deprecated; such files are around
        torch.jit.trace(build_backbone("resnet_tiny").eval(), torch.zeros(1, 3, 64, 32)).save(path)
    with pytest.raises(InputError, match="a TorchScript program") as caught:
        load_model(path)
    code = re.search(r"alone, (.*); nothing was loaded", str(caught.value))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {"torch": torch, "FILE": path, "NEW": tmp_path / "new.pth"})
    assert load_model(tmp_path / "new.pth")[1]["arch"] == "resnet_tiny"


def test_eight_bits(tmp_path):
    """8-bit floats are read, as numbers; what PyTorch does not have is named."""
    state = {k: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for k, v in resnet().items()}
    model, _ = load_model(save(tmp_path, state))
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float())
    for kind, words in (("F8_E4M3", "holds no weights of a backbone"), ("F8_E5M2", "holds no weights"), ("F4", "of type F4, which is not read"),
                        ("F8_E8M0", "of type F8_E8M0, which is not read here: take the file in F32, F16 or BF16")):
        text = json.dumps({"a": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
        (tmp_path / "f8.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(InputError, match=words) as caught:
            load_model(tmp_path / "f8.safetensors")
        assert "damaged" not in str(caught.value)


def patches_of_8():
    state = vit(size=(224, 224), arch="vit_small")
    return state | {"patch_embed.proj.weight": torch.zeros(384, 3, 8, 8), "pos_embed": torch.zeros(1, 785, 384)}


def torchvisions(name):
    import torchvision
    return lambda: getattr(torchvision.models, name)(weights=None).state_dict()


@pytest.mark.parametrize("make, words", [
    (torchvisions("wide_resnet50_2"), r"a wide ResNet of \(3, 4, 6, 3\) blocks"), (patches_of_8, "a ViT of 12 blocks, .* with patches of 8 x 8"),
    (torchvisions("resnext50_32x4d"), "a ResNeXt with 32 groups"), (torchvisions("resnet18"), "a ResNet of blocks of two convolutions")])
def test_relatives_are_not_called_by_our_names(tmp_path, make, words):
    path = save(tmp_path, make())
    assert re.search(rf"backbone  {words}", inspect(path))
    with pytest.raises(InputError, match=f"its network, {words}.*, is none that can be evaluated here") as caught:
        load_model(path)
    assert "--arch" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda s: {k: v for k, v in s.items() if k != "bn1.bias"}, lambda s: s | {"conv1.weight": torch.zeros(32, 1, 7, 7)},
    lambda s: s | {"conv1.weight": torch.zeros(32, 3, 3, 3)}])
def test_inspect_says_what_differs(tmp_path, change):
    path = save(tmp_path, change(resnet()))
    assert re.search("but 1 tensors are not resnet_tiny's, first (bn1.bias|conv1.weight) is", inspect(path))
    with pytest.raises(InputError, match="not all of resnet_tiny; nothing was loaded: 1 of 85 tensors differ") as caught:
        load_model(path)
    assert "--arch" not in str(caught.value)
    assert "are not" not in inspect(save(tmp_path, resnet()))


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": prefixed("teacher.backbone.", s)}, lambda s: {"teacher": s, "student": s, "epoch": 1}])
@pytest.mark.parametrize("stage", ["stages", "layers"])
def test_a_swin_is_called_a_swin(tmp_path, wrap, stage):
    state = {f"{stage}.{i}.blocks.0.attn.w_msa.relative_position_bias_table": torch.ones(3, 3) for i in range(4)}
    with pytest.raises(InputError, match=r"w.pth: holds no weights of a backbone .* \(a Swin, as SOLIDER's are\)"):
        inspect(save(tmp_path, wrap(state | {"patch_embed.projection.weight": torch.ones(96, 3, 4, 4)})))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"teacher": prefixed("backbone.", s), "Loss": {"center": torch.zeros(1)}}])
def test_a_stem_of_convolutions_gets_no_size(tmp_path, wrap):
    """ICS of TransReID-SSL and CION: the last convolution's 8 x 8 are no patches of the image."""
    state = vit(arch="vit_small") | {"patch_embed.proj.weight": torch.zeros(384, 64, 8, 8), "patch_embed.conv.0.weight":
                                     torch.ones(64, 3, 7, 7), "patch_embed.conv.1.IN.weight": torch.ones(32)}
    path = save(tmp_path, wrap(state))
    for action in (inspect, load_model, lambda p: load_weights(p, build_backbone("vit_small"))):
        with pytest.raises(InputError, match="another stem, of convolutions") as caught:
            action(path)
        assert not re.search(r"\d+x\d+|stride", str(caught.value).replace(str(tmp_path), ""))


def test_fast_reids_mgn(tmp_path):
    """Its third stage is cut in two, and goes on in three branches, of which the first is global. The trunk is a start."""
    state = upreid.resnet50().state_dict()
    blocks = {f"6.{k.removeprefix('layer3.0.')}": v for k, v in state.items() if k.startswith("layer3.0.")}
    content = {k: v for k, v in numbered(state).items() if k[0] in "0145"} | blocks
    content = prefixed("backbone.", content) | FASTREID
    for branch in ("b1", "b2", "b3"):
        for name, value in state.items():
            if name.startswith("layer4"):
                content[f"{branch}.1.{name.removeprefix('layer4.')}"] = value
            elif name.startswith("layer3") and not name.startswith("layer3.0."):
                _, number, rest = name.split(".", 2)
                content[f"{branch}.0.{int(number) - 1}.{rest}"] = value
    path, net = save(tmp_path, {"model": content}), upreid.resnet50()
    assert "local branches (JPM, MGN)" in load_weights(path, net)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with pytest.raises(InputError, match="its network, resnet50 with another project's neck and local branches"):
        load_model(path)


def test_numbers_that_python_2_wrote(tmp_path):
    """... as in torchreid's first files: NumPy's bytes were text to it, in no encoding."""
    path = tmp_path / "w.pth.tar"
    torch.save({"state_dict": resnet(), "rank1": "NUMBER"}, path, _use_new_zipfile_serialization=False)
    number = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\nU\x02f8K\x00K\x01\x87RU\x08" + np.float64(0.873).tobytes() + b"tR"
    path.write_bytes(path.read_bytes().replace(b"X\x06\0\0\0NUMBER", number))
    assert torch.equal(load_model(path)[0].conv1.weight, resnet()["conv1.weight"])


def test_an_unpacked_file_of_torch_save_is_called_that(tmp_path):
    with zipfile.ZipFile(save(tmp_path, {"state_dict": resnet()})) as archive:
        archive.extractall(tmp_path)
    with pytest.raises(InputError, match="data.pkl: is a part of an unpacked file of torch.save: name the file as it was downloaded"):
        load_model(tmp_path / "w" / "data.pkl")
