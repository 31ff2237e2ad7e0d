"""Synthetic people: seeded drawings of pedestrians, filed as Market-1501 files its photographs.

No data set at hand, no GPU, no real person's privacy at stake: the demo, the tests and the
exercises run on these. An identity is a body, skin, hair, clothes with patterns and prints,
shoes, bag, hat; an image adds a pose, a view angle, a camera (background, colours, blur,
noise), a sloppy detector's box and at times something in the way. Each camera has its own light
and background, and people share a few garment colours, so a colour histogram hardly finds them
again; prints, patterns and bags do. Every image is a function of (seed, identity, number) alone.
Nothing else in the project needs to be read to understand this file, nor this file to understand
anything else. Read `make_synthetic`, then `render`, then as deep as you like.
"""

import functools
import itertools
import os
import shutil
import signal
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# ---------------------------------------------------------------------------------------------
# A person
# ---------------------------------------------------------------------------------------------

# A body stands in a frame of its own: (side, up, front) in body heights, side to the person's left,
# front where the face looks. All parts live in that frame, so turning it gives every view its due.

# So few colours that many people share theirs.
CLOTHES = [(46, 46, 52), (222, 220, 214), (130, 134, 140), (44, 60, 112), (172, 52, 54),
           (62, 116, 84), (194, 162, 112), (92, 142, 190)]
OUTFITS = 24  # combinations of garments in the whole town
SKINS = [(246, 212, 186), (226, 180, 146), (186, 134, 98), (124, 82, 58)]
HAIRS = [(36, 30, 30), (88, 56, 36), (206, 166, 96), (148, 144, 140), (142, 66, 36)]
TORSO = [(.845, .03, .03), (.815, .095, .045), (.76, .112, .066), (.62, .094, .062),
         (.50, .100, .068), (.36, .118, .085)]  # up, half width, half depth
# Cloth is a function of the angle u around the body (radians, 0 in front) and the height v over its
# middle, so stripes bend out of sight as they should. Where it is True, the second colour shows.
PATTERNS = {"plain": lambda u, v: np.zeros(u.shape, bool),
            "hoops": lambda u, v: v * 15 % 1 < .45,
            "stripes": lambda u, v: u * 1.9 % 1 < .4,
            "checks": lambda u, v: (v * 13 % 1 < .5) ^ (u * 1.6 % 1 < .5),
            "dots": lambda u, v: np.hypot(u * 1.8 % 1 - .5, v * 16 % 1 - .5) < .3,
            "blocks": lambda u, v: v > .02}
# A print is a function of its own coordinates, -1 to 1 from edge to edge (b grows upwards).
PRINTS = {"disc": lambda a, b: a ** 2 + b ** 2 < .8,
          "ring": lambda a, b: abs(np.hypot(a, b) - .7) < .25,
          "cross": lambda a, b: np.minimum(abs(a), abs(b)) < .3,
          "saltire": lambda a, b: abs(abs(a) - abs(b)) < .35,
          "diamond": lambda a, b: abs(a) + abs(b) < 1,
          "triangle": lambda a, b: abs(a) < (1 - b) / 2,
          "bars": lambda a, b: abs(abs(b) - .6) < .3,
          "chevron": lambda a, b: abs(b - .6 + 1.2 * abs(a)) < .4}


def make_person(seed, pid):
    """Draw all that stays the same from one image of a person to the next.

    Garments come from a wardrobe of OUTFITS for everybody, so each person meets several others
    dressed alike: prints, bag, hat, hair and shoes must tell them apart.
    """
    rng = np.random.default_rng([seed, pid, 0])  # number 0 is the person, not one of the images
    wardrobe = np.random.default_rng([seed, 0, 100 + rng.integers(OUTFITS)])  # no person has pid 0

    def pick(source, *options):
        return options[source.integers(len(options))]

    def dye(source):
        colour = pick(source, *CLOTHES) + rng.normal(0, 5, 3)  # each piece faded in its own way
        return tuple(np.clip(colour, 0, 255).astype(int).tolist())

    return SimpleNamespace(
        upper=(dye(wardrobe), dye(wardrobe), pick(wardrobe, *["plain"] * 5, *PATTERNS)),
        lower=(dye(wardrobe), dye(wardrobe),
               pick(wardrobe, *["plain"] * 6, "stripes", "checks", "blocks")),
        legs=pick(wardrobe, "trousers", "trousers", "shorts", "skirt"),
        hem=pick(wardrobe, .49, .49, .45, .36), sleeve=pick(wardrobe, .1, .7, 1, 1),
        height=rng.normal(1, .05), build=rng.uniform(.85, 1.25), skin=pick(rng, *SKINS),
        hair=pick(rng, *HAIRS), style=pick(rng, "short", "short", "long", "tail", "bun", "bald"),
        hat=pick(rng, None, None, None, "cap", "bobble"), hat_colour=dye(rng), shoe=dye(rng),
        prints=[(pick(rng, *PRINTS), dye(rng), pick(rng, False, True, True))
                for _ in ("chest", "back")],
        bag=pick(rng, None, "backpack", "backpack", "shoulder", "hand"), bag_colour=dye(rng),
        bag_side=pick(rng, -1, 1))


class Figure:
    """One body in one view: collects its parts, then paints them from far to near."""

    def __init__(self, size, foot, scale, yaw, build):
        self.size, self.foot, self.scale, self.yaw, self.build = size, foot, scale, yaw, build
        self.cos, self.sin, self.parts = np.cos(yaw), np.sin(yaw), []

    def near(self, point):
        """How far a body point lies in front of the body's axis, as the camera sees it."""
        return point[2] * self.cos - point[0] * self.sin

    def pixel(self, point):
        """Where a body point falls; the camera hangs high, so what is nearer appears lower."""
        return (self.foot[0] + self.scale * (point[0] * self.cos + point[2] * self.sin),
                self.foot[1] - self.scale * (point[1] - .15 * self.near(point)))

    def tube(self, depth, fill, radius, *points):
        """Add a round-ended tube through body points."""
        self.parts.append((depth, fill, radius * self.scale, [self.pixel(p) for p in points]))

    def stack(self, depth, fill, levels, centre=(0, 0, 0)):
        """Add the outline of ellipses (up, half width, half depth) stacked over a body point."""
        (x, y), (up, wide, deep) = self.pixel(centre), np.array(levels).T
        half, rows = self.scale * np.hypot(wide * self.cos, deep * self.sin), y - self.scale * up
        outline = [*zip(x - half, rows), *zip((x + half)[::-1], rows[::-1])]
        self.parts.append((depth, fill, 0, outline))

    def cloth(self, first, second, pattern, middle, prints=()):
        """Picture the cloth as it hangs on this body in this view."""
        column, row = np.meshgrid(*map(np.arange, self.size))
        across = (column - self.foot[0]) / self.scale / self.build
        across = across / np.hypot(.115 * self.cos, .07 * self.sin)
        edge = np.clip(across, -1, 1)
        u = np.arcsin(edge) + across - edge - self.yaw  # arms hang beyond the edge: go on straight
        v = (self.foot[1] - row) / self.scale - middle
        colour = np.where(PATTERNS[pattern](u, v)[..., None], second, first)
        for turn, (shape, ink, shown) in zip((0, np.pi), prints):
            a, b = ((u + turn + np.pi) % (2 * np.pi) - np.pi) / .62, (v - .07) / .075
            inside = (abs(a) < 1) & (abs(b) < 1) & PRINTS[shape](a, b) & shown
            colour = np.where(inside[..., None], ink, colour)
        shade = 1.06 - .3 * edge[..., None] ** 2  # a round body darkens where it turns away
        return Image.fromarray(np.clip(colour * shade, 0, 255).astype(np.uint8))

    def paint(self, image):
        """Paint all parts over an RGB image."""
        for _, fill, radius, points in sorted(self.parts, key=lambda part: part[0]):
            # A faint dark rim keeps an arm apart from a chest in the same cloth.
            for colour, grow, alpha in (((0, 0, 0), 1.5, 70), (fill, 0, 255)):
                mask, r = Image.new("L", self.size), (radius or .012 * self.scale) + grow
                draw = ImageDraw.Draw(mask)
                if not radius:
                    draw.polygon(points, alpha)
                draw.line(points if radius else points + points[:1], alpha, round(2 * r))
                for x, y in points:
                    draw.ellipse((x - r, y - r, x + r, y + r), alpha)
                image.paste(colour, (0, 0, *self.size), mask)


def limb(start, *links):
    """Return the joints of a limb: links are (length, angle), 0 hangs down, positive forward."""
    steps = [(0, -length * np.cos(angle), length * np.sin(angle)) for length, angle in links]
    return list(np.cumsum([start, *steps], axis=0))


def lower_body(figure, person, phase):
    """Add legs in mid-stride, shoes, and what covers them."""
    cloth, build = figure.cloth(*person.lower, .3), figure.build
    for side, turn in ((1, phase), (-1, phase + np.pi)):
        thigh = .42 * np.sin(turn)
        shin = thigh - .1 - .6 * max(0, np.cos(turn))  # the leg that swings forward bends
        hip, knee, ankle = limb((side * .052 * build, .5, 0), (.225, thigh), (.235, shin))
        depth = figure.near(hip) - 2  # legs never hide a coat
        figure.tube(depth, person.shoe, .023, ankle - [0, .015, .01], ankle + [0, -.02, .075])
        figure.tube(depth, person.skin, .031 * build ** .5, hip, knee, ankle)
        if person.legs == "trousers":
            figure.tube(depth, cloth, .042 * build ** .5, hip, knee, ankle + [0, .03, 0])
        elif person.legs == "shorts":
            figure.tube(depth, cloth, .05 * build ** .5, hip, hip + .8 * (knee - hip))
    levels = [(.56, .08 * build, .055 * build), (.47, .09 * build, .06 * build)]
    if person.legs == "skirt":
        levels += [(.29, .13, .12)]  # deep, as it must cover a stride
    figure.stack(-1, cloth, levels)


def upper_body(figure, person, phase):
    """Add torso and prints, swinging arms, and a bag in the hand."""
    build, cloth = figure.build, figure.cloth(*person.upper, .66)
    figure.tube(-.5, person.skin, .03, (0, .88, 0), (0, .82, 0))
    figure.stack(0, figure.cloth(*person.upper, .66, person.prints),
                 [(max(up, person.hem), wide * build, deep * build) for up, wide, deep in TORSO])
    for side, turn in ((1, phase + np.pi), (-1, phase)):  # arms swing against the legs
        swing = .45 * np.sin(turn)
        shoulder, elbow, hand = limb((side * .112 * build, .79, 0), (.165, swing),
                                      (.15, swing + .35))
        depth = figure.near(shoulder + hand)
        figure.tube(depth, person.skin, .024 * build ** .5, shoulder, elbow, hand)
        sleeve = [shoulder, shoulder + person.sleeve * (elbow - shoulder)]
        if person.sleeve == 1:  # it covers the whole upper arm, so it goes on to the wrist
            sleeve += [elbow + .8 * (hand - elbow)]
        figure.tube(depth, cloth, .033 * build ** .5, *sleeve)
        if person.bag == "hand" and side == person.bag_side:
            figure.stack(depth, person.bag_colour, [(-.05, .02, .05), (-.15, .035, .07)], hand)
            figure.tube(depth, person.bag_colour, .008, hand, hand - [0, .05, 0])


def bag(figure, person):
    """Add a backpack or a shoulder bag, and the straps that betray it from the other side."""
    side, colour, thick = person.bag_side, person.bag_colour, .066 * figure.build
    dark = tuple(c * 2 // 3 for c in colour)
    if person.bag == "backpack":
        back, pocket = (0, 0, -thick - .055), (0, 0, -thick - .1)
        figure.stack(figure.near(back), colour,
                     [(.81, .05, .03), (.77, .085, .05), (.56, .09, .06)], back)
        figure.stack(figure.near(pocket), dark, [(.66, .05, .01), (.59, .055, .012)], pocket)
        for x in (-.07, .07):
            figure.tube(figure.near((0, 0, thick)), dark, .011,
                        (x, .835, -.02), (x, .8, thick), (x, .63, thick))
    if person.bag == "shoulder":
        hip = (side * (.11 * figure.build + .03), 0, 0)
        figure.stack(2 * figure.near(hip), colour, [(.53, .03, .07), (.42, .035, .08)], hip)
        for front in (-thick, thick):
            figure.tube(figure.near((0, 0, front)), dark, .01, (-side * .06, .83, 0),
                        (0, .7, front * 1.1), (side * .11 * figure.build, .52, front * .6))


def head(figure, person):
    """Add face, hair and hat."""
    skin, hair, hat, eye = person.skin, person.hair, person.hat_colour, (52, 40, 38)
    nape = figure.near((0, 0, -.1))  # settles whether the hair hides the face or the face the hair
    has = {"face", person.style, person.hat, person.hat and "hat",
           person.style != "bald" and "hair"}
    for trait, depth, fill, radius, *points in (
            ("face", 1, skin, .048, (0, .903, .008), (0, .938, .008)),
            ("face", 1 - nape, skin, .01, (0, .905, .056)),
            ("face", 1 + figure.near((-.02, 0, .036)), eye, .0055, (-.02, .918, .046)),
            ("face", 1 + figure.near((.02, 0, .036)), eye, .0055, (.02, .918, .046)),
            ("hair", 1 + nape, hair, .054, (0, .95, -.008), (0, .92, -.022)),
            ("hair", 1.5, hair, .026, (-.02, .973, .008), (.02, .973, .008)),
            ("long", nape, hair, .05, (0, .93, -.03), (0, .8, -.055)),
            ("tail", 1 + nape, hair, .022, (0, .96, -.06), (0, .9, -.1), (0, .8, -.09)),
            ("bun", 1 + nape, hair, .032, (0, 1, -.045)),
            ("hat", 3, hat, .05, (0, .968, -.012), (0, .968, .004)),
            ("cap", 3, hat, .012, (0, .955, .03), (-.02, .952, .08), (.02, .952, .08)),
            ("bobble", 3, (235, 232, 226), .02, (0, 1.028, 0))):
        if trait in has:
            figure.tube(depth, fill, radius, *points)


def pedestrian(image, person, rng, foot, scale, yaw):
    """Paint a person over an RGB image, at a random moment of a step."""
    figure, phase = Figure(image.size, foot, scale, yaw, person.build), rng.uniform(0, 2 * np.pi)
    lower_body(figure, person, phase)
    upper_body(figure, person, phase)
    bag(figure, person)
    head(figure, person)
    shadow, (x, y), reach = Image.new("L", image.size), foot, .2 * scale
    ImageDraw.Draw(shadow).ellipse((x - reach, y - reach / 5, x + reach, y + reach / 4), 110)
    image.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(reach / 8)))
    figure.paint(image)


# ---------------------------------------------------------------------------------------------
# An image
# ---------------------------------------------------------------------------------------------


@functools.lru_cache
def make_camera(seed, number, size):
    """Return one camera's lasting traits: a wide scene to cut from, its colours, its usual view."""
    rng = np.random.default_rng([seed, 0, number])  # no person has pid 0
    width, height = 6 * size[0], size[1]
    horizon, step = int(height * rng.uniform(.5, .8)), int(rng.integers(50, 170))
    wall, floor = rng.uniform(140, 175, (2, 1)) + rng.normal(0, 4, (2, 3))
    pixels = np.where(np.arange(height)[:, None, None] < horizon, wall, floor)
    for cell, strength in ((4, rng.uniform(25, 45)), (80, 90)):  # rough plaster, then soft light
        grey = rng.integers(0, 256, (height // cell + 1, width // cell + 1), dtype=np.uint8)
        grey = Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC)
        grey = np.asarray(grey) / 255 - .5
        pixels = pixels + strength * grey[..., None] * rng.uniform(.8, 1.2, 3)
    scene = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw, dark = ImageDraw.Draw(scene), tuple((wall * .6).astype(int).tolist())
    tint = tuple(np.clip(wall * rng.choice([.55, .75, 1.3]), 0, 255).astype(int).tolist())
    top, bottom = height * rng.uniform(0, .2), horizon * rng.choice([.6, 1])
    for x in range(0, width, step):  # windows or, down to the ground, pillars
        draw.rectangle((x, top, x + step * rng.uniform(.2, .6), bottom), tint)
    for row in (horizon, *np.geomspace(horizon + 14, height * 1.1, rng.integers(2, 6))):
        draw.line((0, row, width, row), dark, 3)
    return SimpleNamespace(
        scene=scene.filter(ImageFilter.GaussianBlur(rng.uniform(.5, 2.5))), yaw=2.4 * number,
        gain=rng.normal(1, .02, 3), gamma=rng.uniform(.88, 1.15), contrast=rng.uniform(.85, 1.1),
        blur=rng.uniform(.2, .7), noise=rng.uniform(.004, .02))


def occlude(image, rng):
    """Hide a part of an RGB image behind a post, a car or a passer-by."""
    (width, height), (kind, right) = image.size, rng.integers((3, 2))
    colour = tuple((rng.integers(60, 160) + rng.integers(-25, 26, 3)).tolist())
    x = width * (right + rng.uniform(-.1, .1))
    if kind == 0:
        x = width * rng.uniform(.1, .85)
        ImageDraw.Draw(image).rectangle((x, 0, x + width * .08, height), colour)
    elif kind == 1:
        box = x - width * .5, height * rng.uniform(.7, .85), x + width * .5, height * 1.3
        ImageDraw.Draw(image).rounded_rectangle(box, width // 5, colour, (40, 40, 44), 3)
    else:
        stranger = make_person(*rng.integers(1 << 30, size=2))
        pedestrian(image, stranger, rng, (x, height * 1.1), height, rng.uniform(0, 6.3))


def render(job):
    """Draw one image and write it: a function of the job alone, whichever process runs it."""
    path, seed, pid, number, camera_number, kind, (height, width) = job
    rng, canvas = np.random.default_rng([seed, pid, number]), (2 * width, 2 * height)
    person = make_person(seed, pid)
    camera = make_camera(seed, camera_number, canvas)
    left = int(rng.integers(camera.scene.width - canvas[0]))
    image = camera.scene.crop((left, 0, left + canvas[0], canvas[1]))
    scale = canvas[1] * .87 * person.height * rng.normal(1, .05)
    foot = canvas[0] * rng.normal(.5, .05), canvas[1] * rng.normal(.955, .02)
    if kind == "junk":  # what a failing detector leaves: a fragment, too near and off the centre
        scale *= rng.uniform(1.3, 2)
        foot = canvas[0] * rng.integers(2), canvas[1] * rng.uniform(.7, 1.9)
    if kind != "empty":
        yaw = camera.yaw + rng.normal(0, .4) + np.pi * (rng.random() < .25)
        pedestrian(image, person, rng, foot, scale, yaw)
    if rng.random() < .25:
        occlude(image, rng)
    # Halving the picture smooths its edges; then come the lens, the exposure and the sensor.
    image = image.resize((width, height), Image.Resampling.BOX)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur))
    pixels = (np.asarray(image) / 255) ** (camera.gamma * rng.uniform(.9, 1.1))
    pixels = (.5 + (pixels - .5) * camera.contrast) * camera.gain * rng.normal(1, .05)
    pixels = np.clip(pixels + rng.normal(0, camera.noise, pixels.shape), 0, 1)
    Image.fromarray((pixels * 255).astype(np.uint8)).save(path, quality=int(rng.integers(70, 95)))


# ---------------------------------------------------------------------------------------------
# A data set
# ---------------------------------------------------------------------------------------------


def plan(folder, train_ids, test_ids, seed, cameras, size):
    """Yield the jobs of a whole set."""
    def job(part, label, pid, number, camera, kind):
        name = f"{label}_c{camera}s1_{100 * pid + number:06d}_01.jpg"
        return folder / part / name, seed, pid, number, int(camera), kind, size

    for pid in range(1, train_ids + test_ids + 1):
        rng = np.random.default_rng([seed, pid, 0, 1])  # NumPy pads with 0: the 1 sets it apart
        seen_by = 1 + rng.permutation(cameras)[:rng.integers(min(4, cameras), cameras + 1)]
        count, queries = rng.integers(10, 13), rng.integers(1, 3)
        for number, camera in zip(range(1, count + 1), itertools.cycle(seen_by)):
            part = ("bounding_box_train" if pid <= train_ids else
                    "query" if number <= queries else "bounding_box_test")
            yield job(part, f"{pid:04d}", pid, number, camera, "person")
        if pid > train_ids:  # a real gallery also holds strangers, empty boxes and bad boxes
            label, owner, kind = (("0000", pid + test_ids, "person"), ("-1", pid, "junk"),
                                  ("0000", pid + test_ids, "empty"))[rng.integers(3)]
            yield job("bounding_box_test", label, owner, 99, rng.integers(cameras) + 1, kind)


def stay_with(parent: int) -> None:
    """In a worker: Ctrl-C is for the parent, after whose end, whatever it was, none goes on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGALRM, lambda *_: os.getppid() == parent or os._exit(1))
        signal.setitimer(signal.ITIMER_REAL, 1, 1)


def make_synthetic(root, train_ids=100, test_ids=100, seed=0, cameras=6, size=(128, 64),
                   workers=None):
    """Draw a Market-1501 style set of `size` (height, width) JPEGs under `root`, return its Path.

    `workers` processes (None: one per core) share the work and change no byte.
    Raises ValueError for impossible counts and FileExistsError when `root` already holds files.
    """
    root = Path(root).resolve()
    if min(train_ids, test_ids) < 1 or not 2 <= cameras <= 9:
        raise ValueError("make_synthetic needs train_ids, test_ids >= 1 and 2 to 9 cameras")
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} already holds files: name a new or an empty folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{root.name}.", suffix=".partial", dir=root.parent))
    try:
        for part in ("bounding_box_train", "query", "bounding_box_test"):
            (partial / part).mkdir()
        jobs = list(plan(partial, train_ids, test_ids, seed, cameras, size))
        # not multiprocessing's Pool, which waits for ever for a worker that was killed
        with ProcessPoolExecutor(workers, initializer=stay_with, initargs=[os.getpid()]) as pool:
            list(pool.map(render, jobs, chunksize=16))
        partial.chmod(0o755)  # mkdtemp's folders are private
        try:
            if root.exists():
                root.rmdir()
            partial.rename(root)  # only now does it appear: an interrupted run leaves no half set
        except OSError:
            if not (root / "query").is_dir():  # else another process was faster, with the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root
