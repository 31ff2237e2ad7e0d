"""Pictures (PNG, by Pillow alone): rank lists; attention, clusters and correspondence of patches;
what a training sees; curves, studies.

There are two functions for each kind: `draw_...` computes what a picture shows of a dataset and a
model, or of run folders; `..._page` lays out plain values and decides nothing. Rankings are made of
the evaluator's own features (`evaluate.Features`), so that no picture shows what was not measured.
Read `draw_ranks`, `cls_attention`.
"""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from data import (Batches, PKSampler, Record, ShuffleSampler, erasing_noise, normalize,
                  some_identities)
from evaluate import filtered_ranking
from extra.files import InputError, read_image, write_atomic
from extra.flags import PATCHES
from personvit import VisionTransformer

# Okabe and Ito's green and vermilion, which the colour-blind can tell apart
GREEN, RED, GREY, INK = (0, 158, 115), (213, 94, 0), (120, 120, 120), (30, 30, 30)
# their colours, and three more
PALETTE = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (0, 114, 178), (213, 94, 0),
           (204, 121, 167), (120, 120, 120), (150, 80, 200), (140, 200, 60), (240, 228, 66)]
W, H, GAP, LABEL, HEAD = 64, 128, 14, 16, 44  # pixels of a person, between people, of text


class Sheet:
    """A white page, as wide as its title needs, with images of people in rows and columns and a
    text beneath each."""

    def __init__(self, columns: int, rows: int, title: str):
        self.font = ImageFont.load_default(12)
        width = max(2 * GAP + columns * (W + GAP), int(self.font.getlength(title)) + 4 * GAP + W)
        self.image = Image.new("RGB", (width, HEAD + rows * (H + LABEL + GAP)), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: int, y: int, text: str, color=INK) -> None:
        self.draw.text((x, y), text, color, self.font)

    def place(self, column: int, row: int) -> tuple[int, int]:
        """Left upper corner of a cell; the first column stands apart."""
        return (GAP + column * (W + GAP) + (GAP if column else 0),
                HEAD + row * (H + LABEL + GAP))

    def paste(self, pixels: Tensor, column: int, row: int, text: str = "", color=None,
              size=(W, H)) -> None:
        """uint8 (3, h, w) into a cell, framed in color; size: in pixels of the page."""
        x, y = self.place(column, row)
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        self.image.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
        if color:
            self.draw.rectangle((x - 3, y - 3, x + W + 2, y + H + 2), outline=color, width=3)
        self.text(x, y + H + 3, text)


def save(page: Image.Image, file: str | Path) -> None:
    write_atomic(Path(file), lambda handle: page.save(handle, format="PNG"))
    print(f"picture in {file}")


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of 0 .. n - 1, at even distances."""
    return np.linspace(0, n, min(n, most), endpoint=False, dtype=int).tolist()


# ---------------------------------------------------------------------------------------------
# Rank lists
# ---------------------------------------------------------------------------------------------


def draw_ranks(file: str | Path, dataset, result, q, g, rows: int = 8, columns: int = 10) -> None:
    """Rank-list picture (PNG) of a dataset, with camera and cosine distance beneath each image.

    result, q, g as `evaluate.evaluate` returns them. Rows are spread evenly over all valid queries:
    a picture of the best ones only would be a lie.
    """
    def text(record: Record, distance: str = "") -> str:
        return f"c{record.camid + 1} {distance}" if dataset.has_cameras else distance

    table = []
    valid = np.flatnonzero(~np.isnan(result.AP))
    for i in valid[evenly(len(valid), rows)]:
        order, similarity = filtered_ranking(q, g, i)
        query, nearest = dataset.query[i], []
        for j, value in zip(order[:columns].tolist(), similarity.tolist()):
            found = dataset.gallery[j]
            nearest.append((thumbnail(found.path), text(found, f"{1 - value:.3f}"),
                            found.pid == query.pid))
        table.append(((thumbnail(query.path), text(query)), nearest))
    # `evaluate` gives an image number for a camera where cameras do not count
    cameras = dataset.has_cameras and g.camids.tolist() == [r.camid for r in dataset.gallery]
    left_out = "same person from same camera" if cameras else "the query image itself"
    chosen = f"{len(table)} of {len(valid):,} valid queries, evenly spread, good and bad"
    rank_page(file, f"{dataset.name}: nearest {min(columns, len(g.pids))} of {len(g.pids):,} "
                    f"gallery images; {left_out} left out",
              f"below: camera, cosine distance; {chosen}", table)


def draw_search(file: str | Path, title: str, query: str, best: list[tuple[str, float]]) -> None:
    """A photo and what was found for it: paths and cosine similarities."""
    found = [(thumbnail(path), f"{similarity:.3f}", None) for path, similarity in best]
    rank_page(file, title, "0.987 = cosine similarity, 1 = the same",
              [((thumbnail(query), ""), found)])


def thumbnail(path: str) -> Tensor:
    return read_image(path, (H, W), Image.Resampling.BILINEAR)


def rank_page(file: str | Path, title: str, legend: str, rows: list) -> None:
    """A row per query: the query, then its nearest gallery images, framed green if the person is
    the same, red if not, grey if unknown. rows: [(pixels, text), [(pixels, text, same or None),
    ...]] of each; legend explains the texts."""
    columns = 1 + max(len(found) for _, found in rows)
    left = 3 * GAP + W
    sheet = Sheet(columns, len(rows), max(title, legend + 36 * "x", key=len))
    sheet.text(GAP, 6, "query")
    sheet.text(left, 6, title)
    known = any(same is not None for _, found in rows for _, _, same in found)
    for color, name, x in ((GREEN, "same person", left), (RED, "another person", left + 110)):
        if known:
            sheet.draw.rectangle((x, 27, x + 10, 37), outline=color, width=3)
            sheet.text(x + 16, 24, name)
    sheet.text(left + 240 if known else left, 24, legend)
    for row, ((pixels, text), found) in enumerate(rows):
        sheet.paste(pixels, 0, row, text, GREY)
        for column, (pixels, text, same) in enumerate(found, 1):
            color = {None: GREY, True: GREEN, False: RED}[same]
            sheet.paste(pixels, column, row, text, color)
    save(sheet.image, file)


# ---------------------------------------------------------------------------------------------
# Attention, clusters and correspondence of a ViT's patches
# ---------------------------------------------------------------------------------------------


def check(args, model: nn.Module) -> None:
    """Raise InputError if a picture of patches is asked for and the model has none."""
    if any(getattr(args, kind) for kind in PATCHES):
        vit_of(model)


def draw_patches(args, dataset, model: nn.Module, recipe: dict) -> None:
    """The pictures of a ViT's patches that the command line asks for."""
    for kind, draw in zip(PATCHES, (draw_attention, draw_clusters, draw_correspondence)):
        file = getattr(args, kind)
        if file:
            draw(file, dataset, model, recipe)


def vit_of(model: nn.Module) -> VisionTransformer:
    """The backbone of a model, if it is a ViT."""
    backbone = getattr(model, "base", model)
    if not isinstance(backbone, VisionTransformer):
        raise InputError("attention, clusters and correspondence are pictures of a ViT's patches; "
                         "these weights are of a ResNet")
    return backbone


def read_people(dataset, n: int, recipe: dict) -> tuple[Tensor, Tensor]:
    """Query images of n different people, as they are and as the network takes them: uint8 and
    float32, (n, 3, H, W) each."""
    first = list({r.pid: r for r in reversed(dataset.query)}.values())[::-1]     # of each person
    size = tuple(recipe["size"])
    images = torch.stack([read_image(first[i].path, size, Image.Resampling.BILINEAR)
                          for i in evenly(len(first), n)])
    return images, normalize(images, recipe["mean"], recipe["std"])


@torch.inference_mode()
def cls_attention(vit: VisionTransformer, x: Tensor) -> Tensor:
    """How much [CLS] attends to each patch in the last block, by head [ours].

    (B, 3, H, W) -> (B, heads, rows, columns); what is missing to a sum of 1 goes to [CLS] itself.
    """
    last = vit.blocks[-1].attn
    seen = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vit.forward_features(x)
    handle.remove()
    B, N, D = seen[0].shape
    q, k, _ = last.qkv(seen[0]).reshape(B, N, 3, last.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)          # (B, heads, 1, N)
    return weights[:, :, 0, 1:].unflatten(-1, vit.grid_of(*x.shape[2:]))


@torch.inference_mode()
def patch_clusters(vit: VisionTransformer, x: Tensor, count: int = 8, seed: int = 0) -> Tensor:
    """k-means over the patch tokens of all images at once [ours]: cluster of each patch
    (B, rows, columns)."""
    tokens = F.normalize(vit.forward_features(x)[:, 1:].float(), dim=-1)     # (B, N, D)
    points = tokens.flatten(0, 1).cpu().numpy().astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty clusters, where patches are all alike
        _, found = kmeans2(points, min(count, len(points)), minit="++", seed=seed)
    return torch.from_numpy(found).view(len(x), *vit.grid_of(*x.shape[2:]))


def draw_attention(file: str | Path, dataset, model: nn.Module, recipe: dict, n: int = 6) -> None:
    """The attention of each head of the last block, for n people of a dataset."""
    images, x = read_people(dataset, n, recipe)
    attention_page(file, f"{dataset.name}: attention of [CLS] to the patches, last block", images,
                   cls_attention(vit_of(model), x))


def draw_clusters(file: str | Path, dataset, model: nn.Module, recipe: dict, n: int = 20) -> None:
    """Which patches of n people are alike to the network."""
    vit = vit_of(model)
    images, x = read_people(dataset, n, recipe)
    clusters = patch_clusters(vit, x)
    title = f"{dataset.name}: patch tokens in {int(clusters.max()) + 1} clusters"
    cluster_page(file, title, images, clusters)


@torch.inference_mode()
def mutual_nearest(vit: VisionTransformer, x: Tensor, y: Tensor) -> Tensor:
    """Patches of two images (3, H, W) that are each other's most similar, as in PersonViT's
    Figure 6: places (k, 2) among the N of each, in the order of the first image."""
    a, b = F.normalize(vit.forward_features(torch.stack([x, y]))[:, 1:].float(), dim=-1)  # (N, D)
    similarity = a @ b.T                                                     # (N, N)
    there, back = similarity.argmax(1), similarity.argmax(0)
    places = torch.arange(len(a))
    return torch.stack([places, there], dim=1)[back[there] == places]


def draw_correspondence(file: str | Path, dataset, model: nn.Module, recipe: dict,
                        n: int = 12) -> None:
    """Pairs of images of one person, the second from another camera where there is one, with lines
    between patches that are each other's nearest. Pairs are spread evenly over all people."""
    vit, size, pairs, gallery = vit_of(model), tuple(recipe["size"]), {}, {}
    for record in dataset.gallery:
        gallery.setdefault(record.pid, []).append(record)
    for one in dataset.query:
        others = [r for r in gallery.get(one.pid, []) if r.path != one.path]
        others.sort(key=lambda r: r.camid == one.camid)  # stable: another camera's first
        if others and one.pid not in pairs:
            pairs[one.pid] = (one, others[0])
    if not pairs:
        raise InputError(f"{dataset.root}: nobody has two images")
    pairs = [pair for i, pair in enumerate(pairs.values()) if i in evenly(len(pairs), n)]
    found = []
    for pair in pairs:
        images = torch.stack([read_image(r.path, size, Image.Resampling.BILINEAR) for r in pair])
        x = normalize(images, recipe["mean"], recipe["std"])
        found.append((images, mutual_nearest(vit, *x)))
    correspondence_page(file, f"{dataset.name}: patches that are each other's nearest", found,
                        vit.grid_of(*size))


def correspondence_page(file: str | Path, title: str, pairs: list[tuple[Tensor, Tensor]],
                        grid: tuple[int, int], most: int = 12) -> None:
    """Pairs of images, uint8 (2, 3, h, w), and places (k, 2) of patches that belong together, of
    which at most `most` are drawn, evenly spread."""
    title += f"; at most {most} lines a pair"
    sheet = Sheet(min(3 * len(pairs), 12) - 1, math.ceil(len(pairs) / 4), title)
    sheet.text(GAP, 6, title)
    sheet.text(GAP, 24, f"beneath: how many of the {grid[0] * grid[1]} patches")
    for number, (images, places) in enumerate(pairs):
        row, column = number // 4, number % 4 * 3  # a pair stands apart from the next
        corners = [sheet.place(column + side, row) for side in (0, 1)]
        for side in (0, 1):
            sheet.paste(images[side], column + side, row, f"{len(places)}" * (side == 0))
        for i in evenly(len(places), most):
            ends = [(x + (int(place) % grid[1] + 0.5) * W / grid[1],
                     y + (int(place) // grid[1] + 0.5) * H / grid[0])
                    for (x, y), place in zip(corners, places[i])]
            color = PALETTE[i % len(PALETTE)]
            sheet.draw.line([*ends[0], *ends[1]], color)
            for x, y in ends:
                sheet.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    save(sheet.image, file)


def attention_page(file: str | Path, title: str, images: Tensor, attention: Tensor) -> None:
    """A row per person: the image, then each head's attention, bright = much. images uint8
    (n, 3, h, w), attention (n, heads, rows, columns), each map scaled by its own largest value."""
    n, heads = attention.shape[:2]
    title += "; yellow: the head's largest weight, dark: none"
    sheet = Sheet(1 + heads, n, title)
    sheet.text(GAP, 6, title)
    sheet.text(GAP, 24, "image")
    for head in range(heads):
        sheet.text(sheet.place(head + 1, 0)[0], 24, f"head {head + 1}")
    for i in range(n):
        sheet.paste(images[i], 0, i)
        for head in range(heads):
            weight = attention[i, head] / attention[i, head].max().clamp(min=1e-12)
            weight = upscale(weight, images.shape[2:])
            seen = images[i].float().mean(0, keepdim=True) * (0.25 + 0.75 * weight)
            glow = np.array([255, 200, 0])[:, None, None] * (weight * 0.45).numpy()
            pixels = (seen * (1 - 0.45 * weight)).numpy() + glow
            sheet.paste(images.new_tensor(pixels.clip(0, 255)), head + 1, i)
    save(sheet.image, file)


def cluster_page(file: str | Path, title: str, images: Tensor, clusters: Tensor) -> None:
    """People and, beneath each, their patches coloured by cluster. images uint8 (n, 3, h, w),
    clusters (n, rows, columns) from 0."""
    n = len(images)
    per_row = min(n, 10)
    sheet = Sheet(per_row, 2 * math.ceil(n / per_row), title)
    sheet.text(GAP, 6, title)
    sheet.text(GAP, 24, "people, and the same people with each patch in the colour of its cluster")
    colors = images.new_tensor(PALETTE)
    for i in range(n):
        column, row = i % per_row, i // per_row * 2
        sheet.paste(images[i], column, row)
        paint = colors[upscale(clusters[i], images.shape[2:]).long()].permute(2, 0, 1)
        shade = images[i].float().mean(0, keepdim=True)
        sheet.paste((0.15 * shade + 0.85 * paint.float()).to(images.dtype), column, row + 1)
    save(sheet.image, file)


def upscale(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows, columns) -> (H, W): every pixel takes its patch's value."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, grid.shape))
    return grid[rows][:, columns]


# ---------------------------------------------------------------------------------------------
# What a training sees
# ---------------------------------------------------------------------------------------------


def first_views(dataset, recipe, transform) -> dict[str, Tensor]:
    """What train.py's loop makes, on a CPU, of the images of step 0, by name: "image" (B, 3, H, W)
    and the views of a pre-training with its "masks"; or "augmented" (B, 3, H, W)."""
    records = dataset.train
    draw = getattr(recipe, "draw", None)
    if draw:
        sampler = ShuffleSampler(len(records), recipe.batch, recipe.seed)
    else:
        records = some_identities(records, recipe.labelled, recipe.seed)
        sampler = PKSampler([record.pid for record in records], recipe.ids, recipe.images,
                            recipe.seed)
    batch = Batches(records, sampler, transform, recipe.seed, draw)[0]
    images = batch["images"]
    inputs = [images, batch["params"]]
    if draw:
        views = {"image": normalize(images, transform.mean, transform.std), **transform(*inputs)}
        if "masks" in batch:
            views["masks"] = batch["masks"]
        return views
    if recipe.erase == "noise":
        inputs.append(erasing_noise(images, recipe.seed, 0))
    return {"augmented": transform(*inputs)}


def draw_sheet(file: str | Path, dataset, recipe, transform) -> None:
    """Four images of step 0 and their views, a row each, below the names that the code gives them:
    masked patches are black, local views in proportion, stripes below one another. Fine-tuning: a
    row for each identity."""
    rows = getattr(recipe, "ids", 4)
    columns = []                                                             # name, (B, 3, h, w)
    views = first_views(dataset, recipe, transform)
    for name, view in views.items():
        if name == "augmented":
            view = view.unflatten(0, (rows, -1)).transpose(0, 1)
        if name.startswith("stripes"):
            view = F.pad(view, (0, 0, 0, 4), value=9.0)                      # (B, M, 3, h + 4, w)
            view = view.transpose(1, 2).flatten(2, 3)
        if name == "globals":
            masks = F.interpolate(views["masks"].float(), recipe.size)       # (2, B, H, W)
            view = view.masked_fill(masks[:, :, None] > 0, -9.0)             # (2, B, 3, H, W)
        if view.ndim == 5:
            columns += [(name, part) for part in view]
        elif name != "masks":
            columns.append((name, view))
    sheet = Sheet(len(columns), rows, "")
    mean, std = torch.tensor([transform.mean, transform.std])[:, :, None, None]
    for column, (name, view) in enumerate(columns):
        sheet.text(sheet.place(column, 0)[0], 24, name)
        w = W * view.shape[3] // recipe.size[1]                              # of local views: half
        for row, picture in enumerate(view[:rows]):
            pixels = (picture * std + mean) * 255
            sheet.paste(pixels.clamp(0, 255).byte(), column, row, size=(w, 2 * w))
    save(sheet.image, file)


# ---------------------------------------------------------------------------------------------
# Curves of runs, dots of studies
# ---------------------------------------------------------------------------------------------


def draw_curves(file: str | Path, folders: list[str]) -> None:
    """Losses over training, and CMC where a run was evaluated, of one or several run folders."""
    if len(folders) > len(PALETTE):
        raise InputError(f"--runs: {len(folders)} runs, but colours for {len(PALETTE)}")
    losses, cmc = {}, {}
    for folder in folders:
        try:
            text = Path(folder, "log.jsonl").read_text()
            # a person may have written a line, a power cut may have left half of one
            lines = [json.loads(line) for line in text.splitlines(True)
                     if line.startswith("{") and line.endswith("\n")]
            points = [(float(x["step"]), float(x["total"])) for x in lines if "total" in x]
            results = Path(folder, "results.json")
            hits = json.loads(results.read_text()).get("cmc", []) if results.exists() else []
            hits = [min(max(0, float(hit)), 1) for hit in hits]  # NaN becomes 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}: is no run folder with a readable log.jsonl and "
                             f"results.json ({error})") from None
        points = [point for point in points if all(abs(v) < 1e9 for v in point)]
        if points:
            losses[folder] = tuple(zip(*points))
        if hits:
            cmc[folder] = (range(1, len(hits) + 1), hits)
    panels = [("means between log lines", "step", "loss", losses),
              ("share of queries with a correct match so far", "rank", "CMC", cmc)]
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        raise InputError(f"{', '.join(folders)}: nothing logged yet, nothing to draw")
    curve_page(file, panels)


def curve_page(file: str | Path, panels: list[tuple[str, str, str, dict]]) -> None:
    """Line charts side by side. panels: (title, x label, y label, {name: (x values, y values)})."""
    w, h, left, bottom, top = 440, 300, 58, 44, 30
    names = list(dict.fromkeys(name for *_, lines in panels for name in lines))
    page = Image.new("RGB", (w * len(panels), h + 18 * len(names) + 12), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for number, (title, x_label, y_label, lines) in enumerate(panels):
        x0, x1, y0, y1 = w * number + left, w * (number + 1) - 16, h - bottom, top
        xs, ys = (np.concatenate([np.asarray(line[k], float) for line in lines.values()])
                  for k in (0, 1))
        low, high, y_ticks = xs.min(), max(xs.max(), xs.min() + 1), ticks(ys.min(), ys.max())

        def place(x, y):
            return (x0 + (x - low) / (high - low) * (x1 - x0),
                    y0 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (y0 - y1))

        for x, anchor in ((low, "la"), (high, "ra")):
            draw.text((place(x, 0)[0], y0 + 6), f"{x:g}", INK, font, anchor=anchor)
        for y in y_ticks:
            at = place(low, y)
            draw.line((x0 - 4, at[1], x1, at[1]), (225, 225, 225))
            draw.text((x0 - 7, at[1]), f"{y:g}", INK, font, anchor="rm")
        draw.line((x0, y1, x0, y0, x1, y0), GREY)
        draw.text((w * number + 8, 8), f"{y_label}: {title}", INK, font)
        draw.text((x1, y0 + 22), x_label, INK, font, anchor="ra")
        for name, (xs, ys) in lines.items():
            color = PALETTE[names.index(name) % len(PALETTE)]
            points = [place(x, y) for x, y in zip(xs, ys)]
            draw.line([c for point in points for c in point], color, 2, joint="curve")
            for x, y in points[:1] + points[-1:]:  # a single point is no line
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    for i, name in enumerate(names):
        y = h + 4 + 18 * i
        draw.rectangle((left, y + 3, left + 14, y + 11), fill=PALETTE[i % len(PALETTE)])
        draw.text((left + 22, y), name[-60:], INK, font)
    save(page, file)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose low .. high."""
    low = min(low, high - max(1e-3 * abs(high), 1e-9))  # a level line runs along the top
    span = high - low
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
