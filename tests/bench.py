"""Speed on this machine, every comparison in one run: `make bench`, or `python tests/bench.py --quick`.

1. forward + backward of our networks beside torchvision's of the same size, interleaved, so that a
   change of the machine's mood hits both; ratio = median of the paired times (below 1: ours is faster)
2. the pre-training step beside the plain formulation that the reference code has
   and UP-ReID's beside MoCo v2's
3. each training from files to weights: images per second of the data alone, of the computation alone, of both;
   waiting, memory, and the arithmetic's own limit
4. CMC, mAP and re-ranking at MSMT17's size, beside dense textbook versions of fewer pairs
5. LUPerson's size: 4.2 M paths listed, shuffled and read by 16 workers, and their memory
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.utils.flop_counter
import torchvision
from PIL import Image

import evaluate
import personvit
import pretrain
import runs
import train
from augment import ContrastViews, MultiCrop
from data import Images, ShuffleSampler, load_dataset
from personvit import vit_small
from upreid import UPReID, resnet50


def seconds(function, device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_new_process(function, *args):
    """function(*args), where no other measurement has touched the memory."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def paired(ours, theirs, repeats: int, device: str) -> tuple[float, float, float]:
    """Median seconds of both and the median ratio of pairs, taking turns at going first."""
    for f in (ours, theirs):
        seconds(f, device)
    pairs = []
    for i in range(repeats):
        if i % 2:
            b, a = seconds(theirs, device), seconds(ours, device)
        else:
            a, b = seconds(ours, device), seconds(theirs, device)
        pairs.append((a, b))
    a, b = zip(*pairs)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def networks(repeats: int, device: str) -> None:
    """Ours beside torchvision's; its ViT takes square images only, so both get 128 patches of one."""
    B = 64 if device != "cpu" else 8
    theirs_vit = torchvision.models.VisionTransformer(image_size=176, patch_size=16, num_layers=12, num_heads=6,
                                                      hidden_dim=384, mlp_dim=1536)
    theirs_vit.heads = torch.nn.Identity()
    theirs_resnet = torchvision.models.resnet50(weights=None)
    theirs_resnet.fc = torch.nn.Identity()
    for name, ours, theirs, size in (("ResNet-50", resnet50(last_stride=2), theirs_resnet, (256, 128)),
                                     ("ViT-S/16", vit_small((176, 176)), theirs_vit, (176, 176))):
        x = torch.randn(B, 3, *size, device=device)
        nets = [net.to(device).train() for net in (ours, theirs)]

        def step(net):
            net.zero_grad(set_to_none=True)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
                out = net(x)
            out.float().square().mean().backward()

        a, b, ratio = paired(lambda: step(nets[0]), lambda: step(nets[1]), repeats, device)
        print(f"  {name} {size[0]}x{size[1]} forward + backward: ours {B / a:7.1f} img/s, torchvision "
              f"{B / b:7.1f} img/s, time ratio {ratio:.3f}", flush=True)


PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, by their data sheets


class PlainAttention(personvit.Attention):
    """Attention that writes its (N, N) matrix, as timm had it."""

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


def plain_losses(model, views, teacher_temp: float) -> torch.Tensor:
    """The objective the reference's way: all tokens of all views through head and prototypes, loops over views."""
    def net(name, images, *mask):
        z = model[name]["head"](model[name]["backbone"].forward_features(images, *mask))
        return model[name]["head"].last_layer(z[:, 0]), model[name]["head"].last_layer2(z[:, 1:])

    model, centers = {"student": model.student, "teacher": model.teacher, "token": model.mask_token}, (
        model.center, model.patch_center)
    masks, B = views["masks"].to(views["globals"].device), views["globals"].shape[1]
    with torch.no_grad():
        t_cls, t_patch = [out.split(B) for out in net("teacher", views["globals"].flatten(0, 1))]
    s_cls, s_patch = net("student", views["globals"].flatten(0, 1), masks.flatten(0, 1), model["token"])
    local_cls, _ = net("student", views["locals"].flatten(0, 1))
    s_cls, s_patch = torch.cat([s_cls, local_cls]).split(B), s_patch.split(B)
    cls = patch = 0.0
    for i in range(len(t_cls)):
        p_cls = ((t_cls[i] - centers[0]) / teacher_temp).softmax(-1)
        p_patch = ((t_patch[i] - centers[1]) / teacher_temp).softmax(-1)
        for j in range(len(s_cls)):
            if i == j:
                hidden = masks[i].flatten(1).float()
                ce = -(p_patch * (s_patch[j] / 0.1).log_softmax(-1)).sum(-1)
                patch = patch + ((ce * hidden).sum(1) / hidden.sum(1).clamp(min=1)).mean() / len(t_cls)
            else:
                cls = cls - (p_cls * (s_cls[j] / 0.1).log_softmax(-1)).sum(-1).mean() / (len(t_cls) * (len(s_cls) - 1))
    return cls + patch


def pretraining_step(kind: str, B: int, device: str, arch=vit_small, size=(256, 128)):
    """A whole step of ViT-S with 2 + 8 crops, "ours" or "plain", on a fixed batch of B noise images."""
    torch.manual_seed(0)
    model = personvit.PersonViT(arch(size, drop_path=0.1), norm_last_layer=False).to(device).train()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (B, 3, *size), dtype=torch.uint8, generator=generator)
    views = MultiCrop(size)(noise.to(device), 0, 0)
    views["masks"] = personvit.draw_masks(2 * B, *model.student["backbone"].grid, generator).unflatten(0, (2, B))
    optimizer = torch.optim.AdamW(pretrain.matrix_groups(model), lr=1e-5, fused=kind == "ours")
    if kind == "plain":
        for block in (*model.student["backbone"].blocks, *model.teacher["backbone"].blocks):
            block.attn.__class__ = PlainAttention

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            loss = model(views, 0.04, 0.04)["total"] if kind == "ours" else plain_losses(model, views, 0.04)
        optimizer.zero_grad()
        loss.backward()
        pretrain.clip_each(model.parameters(), 3.0)
        optimizer.step()
        if kind == "ours":
            return model.update_teacher(0.996)
        with torch.no_grad():
            for t, s in zip(model.teacher.parameters(), model.student.parameters()):
                t.mul_(0.996).add_(s, alpha=0.004)

    return step


def peak_memory(kind: str, B: int, device: str) -> float:
    """MB that two steps need beyond the model and its batch; run in a process of its own."""
    step = pretraining_step(kind, B, device)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        step(), step()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    before = peak_rss()
    step(), step()
    return peak_rss() - before


def peak_rss() -> float:
    """MB of this process at its largest; Linux only (getrusage would count the parent's peak)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 10


def pretraining(repeats: int, device: str, quick: bool) -> None:
    B = 4 if quick else 8 if device == "cpu" else 128
    steps = [pretraining_step(kind, B, device) for kind in ("ours", "plain")]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        steps[0]()
    a, b, ratio = paired(*steps, max(repeats // 3, 1), device)
    mine, theirs = (in_new_process(peak_memory, kind, B, device) for kind in ("ours", "plain"))
    rate = counter.get_total_flops() / a
    peak = [flops for name, flops in PEAK.items() if device != "cpu" and name in torch.cuda.get_device_name()]
    print(f"  PersonViT step, ViT-S/16 256x128, 2 + 8 crops, batch {B}: ours {B / a:.2f} img/s, plain formulation "
          f"{B / b:.2f} img/s, time ratio {ratio:.3f}; memory {mine:,.0f} MB, plain {theirs:,.0f} MB, ratio "
          f"{mine / theirs:.3f}; {rate / 1e9:,.0f} GFLOP/s" + (f", {rate / peak[0]:.1%} of the peak" if peak else ""),
          flush=True)


def contrast(repeats: int, device: str, quick: bool) -> None:
    """UP-ReID's whole step beside MoCo v2's, which is the same code with the instance contrast alone."""
    B, groups = (4, 2) if quick else (8, 2) if device == "cpu" else (128, 4)
    images = torch.randint(256, (B, 3, 256, 128), dtype=torch.uint8).to(device)

    def make(weight: float):
        model = UPReID(resnet50(last_stride=2), weight_global=weight, weight_local=weight, groups=groups)
        model = model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4, momentum=0.9, fused=True)
        views = ContrastViews(original=weight > 0, stripes=4 if weight else 0)

        def step():
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
                loss = model(views(images, 0, 0))["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_teacher(0.999)

        return step

    a, b, ratio = paired(make(1.0), make(0.0), repeats, device)
    print(f"  UP-ReID step with augmentation, ResNet-50 256x128, batch {B}, queue 65,536: {B / a:.2f} img/s, MoCo v2 "
          f"{B / b:.2f} img/s, time ratio {ratio:.3f}", flush=True)


def matrix_rate(device: str) -> float:
    """Multiplications and additions per second of a large matrix product, in the loops' own precision."""
    n, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / statistics.median(seconds(lambda: a @ a, device) for _ in range(9))


def whole_loop(name: str, device: str, folder: str, steps: int) -> str:
    """One training from files to weights, in a process of its own: what limits it?"""
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a training
    market = device != "cpu"  # the recipes for one GPU, or for a laptop; images are the synthetic people's
    data = "market1501" if market else "synthetic"
    recipe = {"fine-tuning, ResNet": lambda: train.recipe_for(data, "resnet50" if market else "resnet_tiny"),
              "fine-tuning, ViT": lambda: train.recipe_for(data, "vit_small" if market else "vit_mini"),
              "PersonViT": lambda: pretrain.pretrain_recipe_for("personvit", data),
              "UP-ReID": lambda: pretrain.pretrain_recipe_for("upreid", data)}[name]()
    recipe = dataclasses.replace(recipe, bf16=market)
    dataset, real = load_dataset("synthetic", folder), runs.batches
    machine = runs.Machine(device, 1 if device == "cpu" else 8, save_every=10 ** 9, log_every=steps)

    def train_on(batches) -> dict:
        """The last log line of the training as it is, but for where batches come from."""
        lines = []
        with tempfile.TemporaryDirectory() as out:
            run = runs.Run(out, {})
            run.log = lambda **values: lines.append(values)
            runs.batches = batches
            if name.startswith("fine"):
                train.fine_tune(recipe, dataset, run, None, machine)
            else:
                pretrain.pretrain(recipe, dataset, run, machine)
        return lines[-1] if lines else {}

    both = train_on(lambda *args: itertools.islice(real(*args), 2 * steps))
    batch = []

    def alone(images, sampler, first, epochs, workers):
        images = Images(images.records, images.size, cache_bytes=0)
        for i, values in enumerate(real(images, sampler, first, epochs, workers)):
            if i == 2:  # workers have started
                start = time.perf_counter()
            if i == 2 + 2 * steps:
                batch.extend((values, 2 * steps * len(values[0]) / (time.perf_counter() - start)))
                return []
        raise RuntimeError("too few images for this measurement")

    train_on(alone)
    values, data_rate = batch
    compute = train_on(lambda *_: [values] * (2 * steps))
    memory = torch.cuda.max_memory_allocated() / 2 ** 20 if market else peak_rss()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        train_on(lambda *_: [values])
    work, rate = counter.get_total_flops() / len(values[0]), matrix_rate(device)
    return (f"  {name} ({recipe.arch} {recipe.size[0]}x{recipe.size[1]}, batch {len(values[0])}), img/s: data alone "
            f"{data_rate:,.0f} ({machine.workers} worker), compute alone {compute['img_s']:,.0f}, both {both['img_s']:,.0f}, "
            f"waiting {both['wait']:.1%}; peak memory {memory:,.0f} MB; {work / 1e9:.2f} GFLOP per image at "
            f"{rate / 1e9:,.0f} GFLOP/s of a matrix product: at most {rate / work:,.0f} img/s, of which compute reaches "
            f"{compute['img_s'] * work / rate:.0%}")


def loops(device: str, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        load_dataset("synthetic", folder)
        for name in ("fine-tuning, ResNet", "fine-tuning, ViT", "PersonViT", "UP-ReID"):
            print(in_new_process(whole_loop, name, device, folder, 2 if quick else 7), flush=True)


def clustered(Q: int, G: int, ids: int, D: int = 384):
    """Random features that cluster by person, as a trained network's do, with ids and cameras of each."""
    torch.manual_seed(0)
    pids, cams = torch.randint(ids, (Q + G,)), torch.randint(15, (Q + G,))
    centres = torch.nn.functional.normalize(torch.randn(ids, D), dim=1)
    feats = torch.nn.functional.normalize(centres[pids] + 0.08 * torch.randn(Q + G, D), dim=1)
    return feats[:Q], pids[:Q], cams[:Q], feats[Q:], pids[Q:], cams[Q:]


def dense_rank(q, q_pids, q_cams, g, g_pids, g_cams) -> float:
    """mAP with the whole matrix of distances, sorted, as textbooks have it."""
    order = np.argsort((2 - 2 * q @ g.T).numpy(), axis=1)
    APs = []
    for i in range(len(q)):
        same = g_pids[order[i]] == q_pids[i]
        hits = same[~(same & (g_cams[order[i]] == q_cams[i]))].numpy()
        if hits.any():
            APs.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return float(np.mean(APs))


def dense_rerank(q, g, k1: int = 20, k2: int = 6, lam: float = 0.3) -> np.ndarray:
    """Re-ranking with dense (N, N) matrices, as the code in use has it."""
    x = torch.cat([q, g])
    D = (2 - 2 * x @ x.T).clamp(min=0).numpy()
    D /= D.max(1, keepdims=True)
    rank, V = np.argsort(D, 1)[:, :k1 + 1], np.zeros_like(D)
    sets = [set(row) for row in rank.tolist()], [set(row) for row in rank[:, :round(k1 / 2) + 1].tolist()]
    known = [[[j for j in row[i] if i in row[j]] for i in range(len(x))] for row in sets]
    for i in range(len(x)):
        more = set(known[0][i])
        for c in known[0][i]:
            half = known[1][c]
            if len(set(half) & set(known[0][i])) > 2 / 3 * len(half):
                more |= set(half)
        more = list(more)
        V[i, more] = np.exp(-D[i, more]) / np.exp(-D[i, more]).sum()
    V = np.stack([V[rank[i, :k2]].mean(0) for i in range(len(x))])
    inverted = [np.flatnonzero(column) for column in V.T]
    out = np.zeros((len(q), len(x)), np.float32)
    for i in range(len(q)):
        for t in np.flatnonzero(V[i]):
            out[i, inverted[t]] += np.minimum(V[i, t], V[inverted[t], t])
    return ((1 - lam) * (1 - out / (2 - out)) + lam * D[:len(q)])[:, len(q):]


def measured(kind: str, Q: int, G: int, ids: int, device: str) -> tuple[float, float, str]:
    """Seconds, MB above the features (of the CPU), and the result; run in a process of its own."""
    args = [x.to(device) if x.is_floating_point() else x for x in clustered(Q, G, ids)]
    q, _, _, g, _, _ = args
    actions = {"rank": lambda: evaluate.rank_features(*args), "dense rank": lambda: dense_rank(*args),
               "rerank": lambda: evaluate.rank_features(*args, rerank=True),
               "dense rerank": lambda: dense_rerank(q, g).mean()}
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the features (Linux)
    before, start = peak_rss(), time.perf_counter()
    result = actions[kind]()
    return time.perf_counter() - start, peak_rss() - before, str(result)


def ranking(device: str, quick: bool) -> None:
    """MSMT17's size. The dense textbook versions have a quarter of the pairs, in re-ranking a sixteenth: with a
    quarter their matrices, of all images by all, would fill 30 GB."""
    Q, G, ids = (1_000, 8_000, 300) if quick else (11_659, 82_161, 3_060)
    for kind, part in (("rank", 1), ("dense rank", 2), ("rerank", 1), ("dense rerank", 4)):
        size = Q // part, G // part, ids // part
        took, memory, result = in_new_process(measured, kind, *size, device)
        print(f"  {kind} of {size[0]:,} x {size[1]:,}, 384-d: {took:.1f} s, {memory:,.0f} MB above the features; "
              f"{result[:60]}", flush=True)


def memory_of_all() -> tuple[float, int]:
    """MB of this process and its children, a page that several share counted once; and their open files."""
    pids = ["self", *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    pss = [int(re.search(r"Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())[1]) for pid in pids]
    return sum(pss) / 2 ** 10, sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def scale(folder: Path, quick: bool) -> None:
    """LUPerson's number of paths: 1,000 images seen through 4,200 links to their folder. Linux only."""
    links, steps = (42, 100) if quick else (4_200, 10_000)
    for i in range(1000):
        noise = np.random.default_rng(i).integers(0, 256, (64, 32, 3), dtype=np.uint8)
        (folder / "pool").mkdir(exist_ok=True)
        Image.fromarray(noise).save(folder / "pool" / f"{i:04d}.jpg")
    (folder / "luperson").mkdir()
    for i in range(links):
        (folder / "luperson" / f"{i:05d}").symlink_to(folder / "pool")
    lines = (f"{i:05d}/{j:04d}.jpg\n" for i in range(links) for j in range(1000))
    (folder / "luperson.index.txt").write_text("".join(lines))
    start, (before, _) = time.perf_counter(), memory_of_all()
    dataset = load_dataset("luperson", folder)
    listed = time.perf_counter() - start
    sampler = ShuffleSampler(len(dataset.train), 32)
    loader = iter(runs.batches(Images(dataset.train, (64, 32)), sampler, 0, 1, 16))
    next(loader)
    first = time.perf_counter() - start
    print(f"  {len(dataset.train):,} paths from the index in {listed:.1f} s, first batch of 16 workers after {first:.1f} s",
          flush=True)
    start = time.perf_counter()
    for step in range(1, steps):
        if step in (steps // 10, steps - 1):
            memory, files = memory_of_all()
            print(f"    after {step:,} batches of 32: {memory:,.0f} MB in all ({before:,.0f} before the set was opened), "
                  f"{files} open files, {32 * step / (time.perf_counter() - start):,.0f} img/s", flush=True)
        next(loader)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed on this machine.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    args = parser.parse_args()
    repeats = 3 if args.quick else 15
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    networks(repeats, args.device)
    pretraining(repeats, args.device, args.quick)
    contrast(repeats, args.device, args.quick)
    loops(args.device, args.quick)
    ranking(args.device, args.quick)
    with tempfile.TemporaryDirectory() as folder:
        scale(Path(folder), args.quick)


if __name__ == "__main__":
    main()
