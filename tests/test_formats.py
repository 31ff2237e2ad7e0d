"""Weights files: every format, fabricated with the names and nesting of the real ones; damaged and hostile files."""

import argparse
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import upreid
from data import IMAGENET_MEAN
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
    "ours, UP-ReID training": ("resnet", lambda s: {"format": "reid-checkpoint", "step": 3, "model": {
        **prefixed("online.backbone.", s), **prefixed("momentum.backbone.", resnet(9)), "queue": torch.zeros(3, 4)}},
        "training state of this project"),
    "compiled": ("resnet", lambda s: prefixed("_orig_mod.", s), "bare backbone"),
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
    with torch.no_grad():
        plain = net.eval()(x)
        torch.testing.assert_close(model(x), model.bottleneck(plain) if name == "ours, fine-tuned" else plain)
    half = fine_tuned or name == "timm ViT"
    wanted = [0.1] * 3 if name in ("ours, backbone", "ours, fine-tuned") else [0.5] * 3 if half else list(IMAGENET_MEAN)
    assert list(recipe["mean"]) == wanted


def test_the_bottleneck_of_third_party_models_is_read(tmp_path):
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
    "local branches (TransReID's JPM) (b1.0.norm1.weight, bottleneck_1.weight)": lambda s: prefixed("base.", s) | ones(
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
    "another pooling (gem.p)": lambda s: resnet() | ones("gem.p"),
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
    ("layers.0.blocks.0.attn.relative_position_bias_table", "no ViT with a .CLS. token")])
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
    for words in ("vit_mini, 78 tensors", "16x8 patches at stride 16, image 256x128 (inferred", "epoch     221",
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
