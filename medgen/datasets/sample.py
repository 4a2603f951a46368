"""Drawn chest X-rays with lung masks: a dataset without patients, to try everything on.

medgen data sample        (calls draw(Path("data")))

Each image simulates an X-ray exposure: the structures add up to a map of attenuation, and a response curve maps
attenuation to grey values. There are three classes: NORMAL, PNEUMONIA (dense, in one lobe) and COVID19 (peripheral
ground-glass opacities in both lungs). An image is a pure function of (seed, patient, image), independent of the number
of images.

Coordinates: points (N, 2) are (x, y); the image's side is 1, the midline x = 0.5. Lung coordinates are (u, t): u from
the midline (0) to the widest point of the rib cage (1), t from the apex (0) to the costophrenic angle (1). `side` is
-1 for the patient's right (image left) and +1 for the left. Attenuation 1 is the chest without air.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.progress import track

from medgen.console import ERR
from medgen.errors import UserError
from medgen.io import replace_folder

CLASSES = ("NORMAL", "PNEUMONIA", "COVID19")
MIDLINE = np.array([0.5, 0.0])
JPEG_QUALITY = 85
USES = ("visits", "anatomy", "view", "texture", "grain")
SUPERSAMPLING = 2  # side of the canvas over side of the image; the canvas is averaged down

Map = NDArray[np.float32]  # (S, S) attenuation or weight on the canvas
Points = NDArray[np.float64]  # (N, 2)
Outline = Sequence[tuple[float, float]]


# side, u, t, radius in lung heights: upper, middle, lower right; upper, lower left
LOBES = (
    (-1, 0.55, 0.20, 0.20), (-1, 0.45, 0.66, 0.17), (-1, 0.68, 0.76, 0.19), (1, 0.55, 0.27, 0.20),
    (1, 0.76, 0.74, 0.18)
)  # fmt: skip
# roots of the vessel trees at the hilum: direction (0 is lateral, positive is down) and t below its middle
HILAR_BRANCHES = (
    (-1.25, -0.06), (-0.85, -0.05), (-0.40, -0.02), (0.15, 0.03), (0.60, 0.07), (0.95, 0.10), (1.25, 0.11)
)  # fmt: skip
# inner surface of the ribs, (u, t) from the midline over the apex down to the abdomen
CHEST_WALL = (
    (0.0, -0.02), (0.40, -0.005), (0.56, 0.02), (0.70, 0.10), (0.82, 0.24), (0.91, 0.42), (0.97, 0.62),
    (1.005, 0.83), (1.0, 1.1), (0.9, 1.3),
)  # fmt: skip
HORIZONTAL_FISSURE = 0.44  # t; lower border of the right upper lobe


def draw(folder: Path, num_images: int = 480, size: int = 256, seed: int = 0) -> None:
    """Write images/CLASS/person012_pneumonia_1.jpg and lung masks masks/CLASS/person012_pneumonia_1.png (0 or 255).

    A patient has one to three images; the class of patient i is CLASSES[i % 3]. The folder exists only when it is
    complete. An image takes about 0.1 s.

    Raises:
        UserError: the folder contains files.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: already contains files; expected a new or empty folder. Empty it or choose another")
    visits = list(_visits(num_images, seed))
    with replace_folder(folder) as part:
        for patient, image in track(visits, "drawing images", console=ERR, transient=True):
            label = CLASSES[patient % len(CLASSES)]
            pixels, mask = render(label, seed, patient, image, size)
            name = f"person{patient + 1:03d}_{label.lower()}_{image + 1}"
            _write(part / "images" / label / f"{name}.jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            _write(part / "masks" / label / f"{name}.png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 9])


def render(
    label: str, seed: int, patient: int, image: int, size: int = 256
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its lung mask, both (size, size) uint8; the mask is 0 or 255."""
    anatomy = Anatomy(_generator("anatomy", seed, patient))
    view = View(_generator("view", seed, patient, image))
    canvas = size * SUPERSAMPLING
    attenuation, lungs = _draw_chest(label, anatomy, view, canvas, _generator("texture", seed, patient))
    attenuation, lungs = (_pose(layer, view, size) for layer in (attenuation, lungs))
    pixels = _expose(attenuation, view, _generator("grain", seed, patient, image))
    return pixels, np.where(lungs > 0.5, 255, 0).astype(np.uint8)


# ---------------------------------------------------------------- patients and exposures


def _generator(use: str, seed: int, patient: int, image: int = 0) -> np.random.Generator:
    """An independent random generator for each use, patient and image."""
    return np.random.default_rng([USES.index(use), seed, patient, image])


def _visits(num_images: int, seed: int) -> Iterator[tuple[int, int]]:
    """Yield num_images pairs (patient, image); the last patient may have fewer images."""
    patient = written = 0
    while written < num_images:
        num_visits = int(_generator("visits", seed, patient).integers(1, 4))
        for image in range(min(num_visits, num_images - written)):
            yield patient, image
            written += 1
        patient += 1


class Anatomy:
    """Properties of a patient, the same in all images; lengths as shares of the image's side.

    A common factor, the build, correlates the measures of the body.
    """

    def __init__(self, random: np.random.Generator) -> None:
        build = float(np.clip(random.normal(0, 1), -2, 2))  # -2 slim to 2 broad

        def about(mean: float, spread: float, with_build: float = 0.0) -> float:
            return mean + spread * float(np.clip(random.normal(0, 1), -2, 2)) + with_build * build

        self.half_width = about(0.350, 0.010, 0.016)  # midline to the widest point of the rib cage
        self.apex = about(0.135, 0.012)  # y of the lung apices
        self.base = about(0.825, 0.016, -0.016)  # y of the costophrenic angles
        self.dome = about(0.145, 0.014, 0.006)  # height of the right diaphragm above the costophrenic angle, in t
        self.dome_step = about(0.035, 0.010)  # height of the right over the left diaphragm, in t
        self.heart = about(1.0, 0.09, 0.05)  # size; 1 is a cardiothoracic ratio of about 0.5
        self.heart_drop = about(0.0, 0.012, -0.012)  # downward shift, in t; the heart of slim patients is lower
        self.knob = about(0.042, 0.005)  # radius of the aortic knob
        self.wall = about(0.062, 0.010, 0.016)  # thickness of the chest wall outside the ribs
        self.shoulder = about(0.195, 0.015)  # y of the shoulder joint
        self.arm_angle = about(0.60, 0.16)  # radians from straight down
        self.breast = max(0.0, random.uniform(-1, 1))  # 0 (none) to 1
        self.stomach = max(0.0, random.uniform(-1, 1))  # gas under the left diaphragm, 0 (none) to 1
        self.num_ribs = int(random.integers(9, 11))
        self.rib_drop = about(0.155, 0.012, -0.008)  # slope of the ribs
        self.rib_width = about(0.0235, 0.0015)
        self.bone = about(1.0, 0.12)  # bone density
        self.scoliosis = about(0.0, 0.006)  # sideways bend of the spine
        self.trachea = about(-0.006, 0.004)  # x offset of the trachea
        self.vessels = about(1.0, 0.18)  # contrast of the lung vessels
        self.lobe = int(random.integers(len(LOBES)))  # index in LOBES, for PNEUMONIA
        self.severity = random.uniform(0.55, 0.95)  # share of the air that disease replaces


class View:
    """Properties of one exposure, different in each image of a patient."""

    def __init__(self, random: np.random.Generator) -> None:
        borders = random.uniform(0.01, 0.05, 4) * (random.random(4) < 0.15)
        self.collimation: list[float] = borders.tolist()  # width of the dark border: left, top, right, bottom
        self.rotation = random.normal(0, 1.6)  # degrees
        self.scale = random.uniform(1.05, 1.18)
        self.shift = (random.normal(0, 0.012), random.normal(0, 0.012))
        self.inspiration = random.normal(0, 0.015)  # shift of the diaphragm, as a share of lung height
        self.exposure = random.uniform(0.66, 0.84)  # attenuation of middle grey
        self.contrast = random.uniform(0.30, 0.40)  # width of the response curve, in attenuation
        self.detail = random.uniform(0.15, 0.6)  # strength of the sharpening
        self.noise = random.uniform(0.004, 0.012)
        self.severity = random.uniform(0.85, 1.1)  # factor of the patient's severity
        self.marker = str(random.choice(["", "", "R", "L"], p=[0.4, 0.2, 0.3, 0.1]))  # "" for none
        self.marker_at = (random.uniform(0.05, 0.10), random.uniform(0.07, 0.30))


# ---------------------------------------------------------------- drawing


def _spline(points: Outline | Points, samples: int = 12) -> Points:
    """Catmull-Rom spline through the points, (N, 2) -> ((N - 1) * samples + 1, 2)."""
    knots = np.asarray(points, dtype=np.float64)
    padded = np.vstack([2 * knots[0] - knots[1], knots, 2 * knots[-1] - knots[-2]])
    before, start, end, after = padded[:-3, None], padded[1:-2, None], padded[2:-1, None], padded[3:, None]
    s = np.linspace(0, 1, samples, endpoint=False)[None, :, None]
    curve = start + 0.5 * s * (
        end - before + s * (2 * before - 5 * start + 4 * end - after + s * (3 * (start - end) + after - before))
    )
    return np.vstack([curve.reshape(-1, 2), knots[-1:]])


def _pixels(points: Points, size: int) -> NDArray[np.int32]:
    """Convert unit coordinates to OpenCV's fixed-point pixels with 4 fractional bits."""
    return np.round((points * size - 0.5) * 16).astype(np.int32)


def _fill(points: Points, size: int, blur: float = 0.002) -> Map:
    """Mask 0..1 of a closed outline, with an edge of width `blur`."""
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [_pixels(points, size)], 255, cv2.LINE_AA, 4)
    return _blur(mask / 255, blur)


def _ribbon(layer: Map, path: Points, width: NDArray[np.float64] | float, value: NDArray[np.float64] | float) -> None:
    """Paint a band along a path over a layer; width and value are constants or one number per point."""
    widths = np.broadcast_to(np.asarray(width, dtype=np.float64), len(path))[:, None]
    values = np.broadcast_to(np.asarray(value, dtype=np.float64), len(path))
    across = _normals(np.gradient(path, axis=0)) * widths / 2
    _paint(layer, _quads(path[:-1], path[1:], across[:-1], across[1:]), (values[:-1] + values[1:]) / 2)


def _normals(along: Points) -> Points:
    length = np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    return np.asarray(np.stack([-along[:, 1], along[:, 0]], 1) / length)


def _quads(start: Points, end: Points, across_start: Points, across_end: Points) -> NDArray[np.float64]:
    """Quadrilaterals (N, 4, 2) between points, whose corners lie `across` on both sides of them."""
    return np.stack([start + across_start, end + across_end, end - across_end, start - across_start], 1)


def _paint(layer: Map, quads: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    """Fill convex quadrilaterals (N, 4, 2) with one value each."""
    for quad, value in zip(_pixels(quads, layer.shape[0]), values.tolist(), strict=True):
        cv2.fillConvexPoly(layer, quad, value, cv2.LINE_8, 4)


def _bone(path: Points, size: int, width: NDArray[np.float64] | float, value: NDArray[np.float64] | float) -> Map:
    """A long bone: dense cortex around less dense marrow."""
    layer = np.zeros((size, size), np.float32)
    width, value = np.asarray(width), np.asarray(value)
    _ribbon(layer, path, width, value)
    _ribbon(layer, path, width * 0.62, value * 0.66)
    return layer


def _blur(values: ArrayLike, sigma: float) -> Map:
    """Gaussian blur; sigma is a share of the side. A large sigma is applied to a smaller copy, which is faster."""
    layer = _as_map(values)
    size = layer.shape[0]
    pixels = sigma * size
    if pixels < 0.3:
        return layer
    shrink = max(1, int(pixels / 3))
    if shrink == 1:
        return _as_map(cv2.GaussianBlur(layer, (0, 0), pixels, borderType=cv2.BORDER_REPLICATE))
    small = cv2.resize(layer, (size // shrink, size // shrink), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), pixels / shrink, borderType=cv2.BORDER_REPLICATE)
    return _as_map(cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC))


def _smooth_noise(random: np.random.Generator, size: int, cells: int) -> Map:
    """Smooth noise of mean 0 and standard deviation about 1 from `cells` x `cells` values, independent of the size."""
    grid = random.normal(0, 1, (cells, cells)).astype(np.float32)
    return _as_map(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC))


def _round_thickness(mask: Map, radius: float) -> Map:
    """Thickness 0..1 of a body with this silhouette and edges rounded with `radius`."""
    size = mask.shape[0]
    depth = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, 5) / (radius * size)
    return _blur(np.sqrt(1 - (1 - np.clip(depth, 0, 1)) ** 2), 0.004)


def _as_map(values: ArrayLike) -> Map:
    return np.asarray(values, np.float32)


def _logistic(x: ArrayLike) -> Map:
    """Logistic function."""
    return _as_map(0.5 + 0.5 * np.tanh(np.asarray(x) / 2))


def _grid(size: int) -> tuple[Map, Map]:
    """x (1, S) and y (S, 1) of the pixel centres."""
    line = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return line[None, :], line[:, None]


def _to_image(anatomy: Anatomy, side: int, points: Outline | Points) -> Points:
    """Convert lung coordinates (u, t) of one side to image coordinates."""
    scale = (side * anatomy.half_width, anatomy.base - anatomy.apex)
    return np.asarray(points, dtype=np.float64) * scale + (0.5, anatomy.apex)


def _to_image_point(anatomy: Anatomy, side: int, u: float, t: float) -> tuple[float, float]:
    x, y = _to_image(anatomy, side, [(u, t)])[0]
    return float(x), float(y)


def _ellipsoid(size: int, centre: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Map:
    """Thickness 0..1 of an ellipsoid seen from the front; angle in radians."""
    reach = max(radii)
    columns, rows = (slice(max(0, int((c - reach) * size)), max(0, int((c + reach) * size) + 2)) for c in centre)
    x, y = _grid(size)
    dx, dy = x[:, columns] - np.float32(centre[0]), y[rows] - np.float32(centre[1])
    cosine, sine = np.cos(angle), np.sin(angle)
    along, across = (dx * cosine + dy * sine) / radii[0], (dy * cosine - dx * sine) / radii[1]
    layer = np.zeros((size, size), np.float32)
    layer[rows, columns] = np.sqrt(np.maximum(1 - along**2 - across**2, 0))
    return layer


# ---------------------------------------------------------------- anatomy, one function per structure


def _draw_chest(label: str, anatomy: Anatomy, view: View, size: int, random: np.random.Generator) -> tuple[Map, Map]:
    """Attenuation of the whole chest and the lung mask, both (size, size) float32 before posing."""
    lungs = {side: _fill(_lung(anatomy, view, side), size) for side in (-1, 1)}
    both = lungs[-1] + lungs[1]
    cavity = _cavity(anatomy, size)
    _, y = _grid(size)
    apical = 0.72 + 0.28 * _logistic((y - anatomy.apex - 0.10) / 0.03)  # muscle over the apices
    air = _blur(both, 0.0015) * (0.24 + 0.42 * cavity) * apical
    vessels = _vessels(anatomy, size, random)
    opacity = _opacity(label, anatomy, view, lungs, random)
    parenchyma = 1 + 0.03 * _smooth_noise(random, size, 24) + 0.02 * _smooth_noise(random, size, 64)

    attenuation = _body(anatomy, size) * (1 + 0.02 * _smooth_noise(random, size, 6))
    attenuation -= air * parenchyma * (1 - opacity)
    attenuation += both * vessels * (1 - 0.7 * opacity)
    attenuation += _heart(anatomy, size) + _abdomen(anatomy, view, both, size) + _breasts(anatomy, size)
    attenuation += _ribs(anatomy, size) + _spine(anatomy, size) + _shoulder_girdle(anatomy, size)
    attenuation -= _airways(anatomy, size) * (1 - 0.9 * both)
    return _blur(np.maximum(attenuation, 0), 0.0016), both


def _lung(anatomy: Anatomy, view: View, side: int) -> Points:
    """Outline of one lung: lateral wall, diaphragm, then the mediastinal border back to the apex."""
    angle_t = view.inspiration
    lateral = [
        (0.40, 0.0), (0.55, 0.025), (0.69, 0.10), (0.81, 0.24), (0.90, 0.42), (0.96, 0.62), (0.995, 0.83),
        (0.985, 1 + angle_t)
    ]  # fmt: skip
    if side < 0:
        top = 1 + angle_t - anatomy.dome
        heart = 0.27 * anatomy.heart
        diaphragm = [
            (0.985, 1 + angle_t), (0.93, top + 0.085), (0.80, top + 0.025), (0.62, top), (0.44, top + 0.008),
            (0.225, top + 0.06)
        ]  # fmt: skip
        medial = [
            (0.225, top + 0.06), (heart - 0.01, top - 0.03), (heart, 0.73), (heart - 0.035, 0.61),
            (0.195, 0.51), (0.18, 0.43), (0.165, 0.34), (0.18, 0.22), (0.21, 0.11), (0.28, 0.03), (0.40, 0.0)
        ]  # fmt: skip
    else:
        top = 1 + angle_t - anatomy.dome + anatomy.dome_step
        heart, low, knob = 0.56 * anatomy.heart, anatomy.heart_drop, anatomy.knob / anatomy.half_width
        diaphragm = [
            (0.985, 1 + angle_t), (0.94, top + 0.075), (0.84, top + 0.022), (0.72, top),
            (heart - 0.02, top + 0.022)
        ]  # fmt: skip
        medial = [
            (heart - 0.02, top + 0.022), (heart + 0.008, top - 0.045 + low), (heart - 0.05, 0.69 + low),
            (heart - 0.175, 0.56 + low), (0.245, 0.46), (0.205, 0.385), (0.13 + knob, 0.325),
            (0.155 + knob, 0.275), (0.12 + knob, 0.22), (0.205, 0.14), (0.27, 0.04), (0.40, 0.0)
        ]  # fmt: skip
    return np.vstack([_spline(_to_image(anatomy, side, part)) for part in (lateral, diaphragm, medial)])


def _cavity(anatomy: Anatomy, size: int) -> Map:
    """Depth of the chest cavity from front to back, 0..1; it decreases towards the lateral wall."""
    right, left = (_spline(_to_image(anatomy, side, CHEST_WALL)) for side in (-1, 1))
    return _round_thickness(_fill(np.vstack([right, left[::-1]]), size), 0.6 * anatomy.half_width)


def _body(anatomy: Anatomy, size: int) -> Map:
    """Thickness of the soft tissue of trunk, neck and arms; 1 in the middle of the trunk."""
    width = anatomy.half_width + anatomy.wall
    joint = width * 0.96
    trunk = [
        (0.0, -0.1), (0.115, -0.1), (0.12, 0.02), (0.16, 0.085), (joint * 0.62, anatomy.shoulder - 0.085),
        (joint, anatomy.shoulder - 0.045), (joint + 0.035, anatomy.shoulder + 0.05), (width - 0.005, 0.36),
        (width - 0.004, 0.48), (width, 0.62), (width + 0.002, 0.80), (width - 0.012, 1.1), (0.0, 1.1)
    ]  # fmt: skip
    outline = _spline(trunk)
    mirrored = np.stack([-outline[::-1, 0], outline[::-1, 1]], 1)
    silhouette = _fill(np.vstack([outline, mirrored]) + MIDLINE, size)
    thickness = _round_thickness(silhouette, 0.55 * anatomy.half_width)
    _, y = _grid(size)
    shoulders = 0.70 + 0.30 * _logistic((y - anatomy.shoulder - 0.03) / 0.045)  # the neck and shoulders are thinner
    arms = np.zeros((size, size), np.float32)
    for side in (-1, 1):
        start = np.array([0.5 + side * (joint - 0.01), anatomy.shoulder + 0.02])
        reach = np.array([side * np.sin(anatomy.arm_angle), np.cos(anatomy.arm_angle)])
        _ribbon(arms, start + np.linspace(0, 0.6, 8)[:, None] * reach, np.linspace(0.15, 0.115, 8), 1.0)
    limbs = 0.52 * _round_thickness(arms, 0.065)
    return _as_map(np.maximum(thickness * shoulders, limbs))


def _heart(anatomy: Anatomy, size: int) -> Map:
    """Attenuation of heart, great vessels and mediastinum in addition to the soft tissue of the trunk."""
    cx, cy = _to_image_point(anatomy, 1, 0.17, 0.69 + anatomy.heart_drop)
    width = anatomy.half_width * anatomy.heart
    heart = _ellipsoid(size, (cx, cy), (0.50 * width, 0.40 * width), 0.5)
    knob = _ellipsoid(size, _to_image_point(anatomy, 1, 0.13, 0.27), (anatomy.knob, anatomy.knob * 1.05))
    centre = _ellipsoid(size, _to_image_point(anatomy, 1, 0.07, 0.5), (0.24 * anatomy.half_width, 0.36))
    return _blur(0.20 * heart + 0.08 * knob, 0.004) + _blur(0.12 * centre, 0.012)


def _abdomen(anatomy: Anatomy, view: View, lungs: Map, size: int) -> Map:
    """Liver and spleen below the diaphragm, and the gastric bubble with its fluid level."""
    x, y = _grid(size)
    height = anatomy.base - anatomy.apex
    top = anatomy.apex + (1 + view.inspiration - anatomy.dome) * height
    below = _logistic((y - top - 0.02) / 0.022)
    inside = _blur((1 - lungs), 0.003)
    within = np.clip((anatomy.half_width + 0.03 - np.abs(x - 0.5)) / 0.10, 0, 1)
    liver = (0.17 + 0.04 * (0.5 - x)) * below * inside * within
    if anatomy.stomach < 0.15:
        return _as_map(liver)
    radius = 0.045 + 0.035 * anatomy.stomach
    cx, cy = _to_image_point(anatomy, 1, 0.60, 1 + view.inspiration - anatomy.dome + anatomy.dome_step)
    gas = _ellipsoid(size, (cx, cy + 0.028 + radius * 0.62), (radius * 1.25, radius * 0.62))
    fluid = _logistic((cy + 0.028 + radius * 0.75 - y) / 0.003)
    return _as_map(liver - 0.50 * _blur(gas * fluid, 0.003))


def _breasts(anatomy: Anatomy, size: int) -> Map:
    """Breast shadows over the lower lung fields; zero for some patients."""
    layer = np.zeros((size, size), np.float32)
    if anatomy.breast < 0.1:
        return layer
    for side in (-1, 1):
        cx, cy = _to_image_point(anatomy, side, 0.60, 0.74)
        radius = 0.09 + 0.045 * anatomy.breast
        layer += _ellipsoid(size, (cx, cy), (radius * 1.1, radius))
    return _blur(0.13 * anatomy.breast * layer, 0.006)


def _ribs(anatomy: Anatomy, size: int) -> Map:
    """Ribs as curves around an elliptic trunk: from the spine outward and down, then forward and inward, fainter.

    Ribs are densest at the lateral wall, where the beam passes along them.
    """
    layer = np.zeros((size, size), np.float32)
    height = anatomy.base - anatomy.apex
    widths, heights = np.array(CHEST_WALL).T
    spacing = 0.885 / (anatomy.num_ribs - 1)
    for rib in range(anatomy.num_ribs):
        start = -0.035 + spacing * rib  # t at the spine
        fall = anatomy.rib_drop / height * min(1.0, 0.62 + 0.13 * rib) * (1 + 0.018 * rib)
        wall = float(np.interp(start + fall, heights, widths)) + 0.02
        width = anatomy.rib_width * min(1.0, 0.75 + 0.12 * rib)
        for side in (-1, 1):
            layer += _rib(anatomy, size, side, start, fall, wall, width)
    return _blur(layer, 0.0015)


def _rib(anatomy: Anatomy, size: int, side: int, start: float, fall: float, wall: float, width: float) -> Map:
    """One rib: its posterior part, and its anterior part up to the cartilage."""
    back = np.linspace(0.0, np.pi / 2, 28)
    front = np.linspace(np.pi / 2, 2.35, 18)
    arch = 0.10 + (wall - 0.10) * np.sin(back)
    path = np.stack([arch, start + fall * (back / (np.pi / 2)) ** 1.75 - 0.022 * np.sin(2 * back)], 1)
    dense = 0.105 * anatomy.bone * (1 + 0.55 * np.sin(back) ** 6)
    layer = _bone(_to_image(anatomy, side, path), size, width * (1 - 0.25 * np.sin(back) ** 4), dense)
    turn = (front - np.pi / 2) / (2.35 - np.pi / 2)
    path = np.stack([wall - (wall - 0.42) * turn**1.7, start + fall * (1 + 0.72 * turn**0.9)], 1)
    density = 0.105 * anatomy.bone * (1.0 if start < 0.75 else 0.6)  # the lowest ribs are not attached to the sternum
    faint = density * (0.55 + 0.95 * (1 - turn) ** 5) * np.clip((1 - turn) * 3, 0, 1)
    layer += _bone(_to_image(anatomy, side, path), size, width * (0.78 + 0.35 * turn), faint)
    return layer


def _spine(anatomy: Anatomy, size: int) -> Map:
    """Vertebral bodies with discs, two pedicles and a spinous process each."""
    layer = np.zeros((size, size), np.float32)
    details = np.zeros((size, size), np.float32)
    y, step = -0.02, 0.052
    while y < 1.02:
        half, middle = 0.030 + 0.010 * y, y + step / 2
        bend = anatomy.scoliosis * np.sin(3.0 * (middle - 0.2))
        edge = step * 0.43
        waist = [
            (-half, -edge), (0, -edge * 0.93), (half, -edge), (half * 0.88, 0), (half, edge),
            (0, edge * 0.93), (-half, edge), (-half * 0.88, 0), (-half, -edge)
        ]  # fmt: skip
        centre = np.array([0.5 + bend, middle])
        for scale, density in ((1.0, 1.0), 0.120), ((0.86, 0.74), 0.095):  # dense cortex around marrow
            outline = np.asarray(waist) * scale + centre
            cv2.fillPoly(layer, [_pixels(outline, size)], density * anatomy.bone, cv2.LINE_8, 4)
        for side in (-1, 1):
            pedicle = centre + np.array([[side * half * 0.68, -0.010], [side * half * 0.68, 0.004]])
            _ribbon(details, pedicle, 0.011, 0.055)
        process = centre + np.array([[0.0, 0.004], [0.0, 0.026]])
        _ribbon(details, process, np.array([0.006, 0.011]), 0.06)
        y, step = y + step, step * 1.022
    column = _ellipsoid(size, (0.5, 0.5), (0.062, 0.9)) * 0.15  # muscle, discs and transverse processes
    return _as_map(_blur(layer + details, 0.0036) + _blur(column, 0.012))


def _shoulder_girdle(anatomy: Anatomy, size: int) -> Map:
    """Clavicles, scapulae and upper arm bones of both sides."""
    layer = np.zeros((size, size), np.float32)
    for side in (-1, 1):
        layer += _clavicle(anatomy, size, side) + _scapula(anatomy, size, side) + _humerus(anatomy, size, side)
    return _blur(layer * anatomy.bone, 0.0018)


def _side_curve(side: int, points: Outline | Points) -> Points:
    """Smooth curve through points (distance from the midline, y)."""
    return _spline(np.asarray(points, dtype=np.float64) * (side, 1) + MIDLINE)


def _joint(anatomy: Anatomy) -> float:
    """Distance of the shoulder joint from the midline."""
    return 0.95 * (anatomy.half_width + anatomy.wall)


def _clavicle(anatomy: Anatomy, size: int, side: int) -> Map:
    """S-shaped bone from the sternum, where it is thickest, over the lung apex to the shoulder."""
    sternum, top, end = anatomy.apex + 0.085, anatomy.shoulder, 0.95 * _joint(anatomy)
    medial = [(0.040, sternum), (0.095, sternum - 0.022), (0.185, sternum - 0.045)]
    path = _side_curve(side, [*medial, (0.265, top - 0.020), (end, top - 0.045)])
    width = np.interp(np.linspace(0, 1, len(path)), [0, 0.12, 0.5, 1], [0.034, 0.024, 0.021, 0.027])
    return _bone(path, size, width, 0.19)


def _scapula(anatomy: Anatomy, size: int, side: int) -> Map:
    """Shoulder blade: a faint triangle with a denser lateral border and spine."""
    joint, top = _joint(anatomy), anatomy.shoulder
    inner = [(joint - 0.04, top - 0.005), (joint - 0.135, top + 0.015), (joint - 0.155, top + 0.11)]
    tip = [(joint - 0.115, top + 0.245), (joint - 0.095, top + 0.25)]
    outer = [(joint - 0.065, top + 0.13), (joint - 0.03, top + 0.05)]
    edges = np.zeros((size, size), np.float32)
    _ribbon(edges, _side_curve(side, [*inner[1:], tip[0]]), 0.006, 0.05)
    border = _side_curve(side, [tip[1], *outer])
    _ribbon(edges, border, 0.012, np.linspace(0.03, 0.10, len(border)))
    spine = [(joint - 0.115, top + 0.035), (joint - 0.06, top - 0.005), (joint + 0.005, top - 0.045)]
    _ribbon(edges, _side_curve(side, spine), 0.014, 0.09)
    return edges + 0.055 * _fill(_side_curve(side, [*inner, *tip, *outer, inner[0]]), size, 0.003)


def _humerus(anatomy: Anatomy, size: int, side: int) -> Map:
    """Bone of the upper arm: a round head in the shoulder joint and a shaft along the arm."""
    joint, top = _joint(anatomy), anatomy.shoulder
    reach = np.array([np.sin(anatomy.arm_angle), np.cos(anatomy.arm_angle)])
    shaft = _side_curve(side, np.array([joint + 0.015, top + 0.02]) + np.linspace(0.0, 0.6, 10)[:, None] * reach)
    along = np.linspace(0, 1, len(shaft))
    width = np.interp(along, [0, 0.15, 1], [0.052, 0.036, 0.034])
    head = _ellipsoid(size, (0.5 + side * (joint + 0.012), top + 0.012), (0.036, 0.040))
    return 0.22 * head + _bone(shaft, size, width, 0.20 * np.minimum(9 * along, 1))


def _airways(anatomy: Anatomy, size: int) -> Map:
    """Air column of the trachea, slightly to the patient's right, and the two main bronchi."""
    layer = np.zeros((size, size), np.float32)
    x = 0.5 + anatomy.trachea
    carina = float(_to_image(anatomy, 1, [(0, 0.35)])[0, 1])
    _ribbon(layer, _spline([(x + 0.004, -0.02), (x + 0.002, 0.1), (x, carina)]), 0.036, np.linspace(0.20, 0.30, 25))
    right = [(x - 0.002, carina - 0.012), (x - 0.025, carina + 0.035), (x - 0.055, carina + 0.085)]
    left = [(x + 0.002, carina - 0.012), (x + 0.038, carina + 0.032), (x + 0.080, carina + 0.062)]
    _ribbon(layer, _spline(right), 0.025, 0.24)
    _ribbon(layer, _spline(left), 0.023, 0.22)
    return _blur(layer, 0.005)


def _vessels(anatomy: Anatomy, size: int, random: np.random.Generator) -> Map:
    """Hila and the vessel trees that branch from them and get thinner towards the wall."""
    layer = np.zeros((size, size), np.float32)
    hila = np.zeros((size, size), np.float32)
    directions, below = np.array(HILAR_BRANCHES).T
    for side, middle in ((-1, 0.46), (1, 0.43)):
        out, down = random.normal(0.24, 0.025, len(below)), middle + below + random.normal(0, 0.018, len(below))
        angles = directions + random.normal(0, 0.16, len(directions))
        _tree(layer, anatomy, side, np.stack([out, down], 1), angles, 0.0125, random)
        cx, cy = _to_image_point(anatomy, side, 0.26, middle + 0.015)
        hila += _ellipsoid(size, (cx, cy), (0.035, 0.075), 0.25 * side)
    return _as_map((_blur(layer, 0.0022) + _blur(0.17 * hila, 0.010)) * anatomy.vessels)


def _tree(
    layer: Map,
    anatomy: Anatomy,
    side: int,
    starts: Points,
    angles: NDArray[np.float64],
    width: float,
    random: np.random.Generator,
) -> None:
    """Paint trees whose branches split in two until they are too thin to be visible.

    The roots `starts` (N, 2) are in lung coordinates; angle 0 is lateral, positive is down.
    """
    widths = np.full(len(starts), width)
    drawn: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    while len(starts):
        count = len(starts)
        lengths = random.uniform(0.05, 0.08, count) * (widths / width) ** 0.25
        bends = random.normal(0, 0.14, count)
        for angle in (angles + bends, angles + 2 * bends):
            step = np.stack([1.35 * np.cos(angle), np.sin(angle)], 1)  # lungs are taller than wide
            ends = starts + lengths[:, None] * step
            path = _to_image(anatomy, side, np.vstack([starts, ends])).reshape(2, count, 2)
            across = _normals(path[1] - path[0]) * widths[:, None] / 2
            drawn.append((_quads(path[0], path[1], across, across), 0.01 + 8.5 * widths))
            starts = ends
        splits = random.uniform(0.13, 0.50, (2, count)) * [[1], [-1]]
        starts, angles = np.vstack([starts, starts]), (angles + 2 * bends + splits).ravel()
        widths = np.concatenate([0.78 * widths, 0.66 * widths])
        visible = widths > 0.003
        starts, angles, widths = starts[visible], angles[visible], widths[visible]
    for quads, values in reversed(drawn):  # trunks cover their branches
        _paint(layer, quads, values)


# ---------------------------------------------------------------- disease


def _opacity(label: str, anatomy: Anatomy, view: View, lungs: dict[int, Map], random: np.random.Generator) -> Map:
    """Share of the lung's air that the disease of a class replaces, 0..1."""
    severity = min(0.97, anatomy.severity * view.severity)
    if label == "PNEUMONIA":
        return _consolidation(anatomy, severity, lungs, random)
    if label == "COVID19":
        return _ground_glass(anatomy, severity, lungs, random)
    return np.zeros_like(lungs[-1])


def _patch(size: int, centre: Points, radii: tuple[float, float], rough: Map) -> Map:
    """Ellipse 0..1 with an irregular soft edge."""
    x, y = _grid(size)
    distance = np.sqrt(((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2)
    return _logistic((0.85 - distance - 0.28 * rough) / 0.14)


def _consolidation(anatomy: Anatomy, severity: float, lungs: dict[int, Map], random: np.random.Generator) -> Map:
    """Lobar pneumonia: a dense opacity with soft edges and dark air bronchograms."""
    side, u, t, radius = LOBES[anatomy.lobe]
    size = lungs[side].shape[0]
    centre = _to_image(anatomy, side, [(u + random.normal(0, 0.05), t + random.normal(0, 0.03))])[0]
    reach = radius * (anatomy.base - anatomy.apex) * random.uniform(0.85, 1.25)
    rough = 0.6 * _smooth_noise(random, size, 9) + 0.4 * _smooth_noise(random, size, 22)
    blob = _patch(size, centre, (reach * 1.1, reach), rough)
    if side < 0 and t < HORIZONTAL_FISSURE:
        fissure = float(_to_image(anatomy, side, [(0, HORIZONTAL_FISSURE)])[0, 1])
        blob = blob * _logistic((fissure - _grid(size)[1]) / 0.006)
    bronchi = np.zeros((size, size), np.float32)
    hilum = np.array((0.24, 0.45))
    towards = float(np.arctan2(t - hilum[1], u - hilum[0]))
    _tree(bronchi, anatomy, side, np.tile(hilum, (3, 1)), towards + np.array([-0.35, 0.0, 0.35]), 0.011, random)
    open_air = 1 - 0.30 * _blur(np.minimum(bronchi * 12, 1), 0.003)
    mottle = 1 + 0.10 * _smooth_noise(random, size, 40)
    return _as_map(np.clip(blob * severity * open_air * mottle * lungs[side], 0, 0.98))


def _ground_glass(anatomy: Anatomy, severity: float, lungs: dict[int, Map], random: np.random.Generator) -> Map:
    """COVID-19 pneumonia: ground-glass opacities in both lungs, peripheral and basal, with a reticular pattern."""
    size = lungs[-1].shape[0]
    x, _ = _grid(size)
    haze = np.zeros((size, size), np.float32)
    for side in (-1, 1):
        rough = 0.6 * _smooth_noise(random, size, 10) + 0.5 * _smooth_noise(random, size, 26)
        for t in (0.40, 0.62, 0.82):
            where = (random.uniform(0.70, 0.92), t + random.normal(0, 0.05))
            radius = random.uniform(0.075, 0.13) * (0.85 + 0.35 * t)
            patch = _patch(size, _to_image(anatomy, side, [where])[0], (radius * 0.85, radius * 1.15), rough)
            haze = np.maximum(haze, patch * lungs[side] * random.uniform(0.75, 1.0))
    outer = np.clip(np.abs(x - 0.5) / anatomy.half_width * 1.5 - 0.25, 0.15, 1)  # peripheral
    network = 1 + 0.16 * _smooth_noise(random, size, 48) - 0.10 * np.abs(_smooth_noise(random, size, 70))
    return _as_map(np.clip(haze * outer * network * 0.78 * severity, 0, 0.9))


# ---------------------------------------------------------------- exposure


def _pose(layer: Map, view: View, size: int) -> Map:
    """Rotate, scale and shift a layer, and average the canvas down to (size, size)."""
    canvas = layer.shape[0]
    matrix = cv2.getRotationMatrix2D((canvas / 2, canvas / 2), view.rotation, view.scale)
    matrix[:, 2] += np.asarray(view.shift) * canvas
    posed = cv2.warpAffine(layer, matrix, (canvas, canvas), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return _as_map(cv2.resize(posed, (size, size), interpolation=cv2.INTER_AREA))


def _expose(attenuation: Map, view: View, random: np.random.Generator) -> NDArray[np.uint8]:
    """Grey values of attenuation: scatter, sharpening, quantum noise, response curve, marker and collimation."""
    size = attenuation.shape[0]
    scattered = 0.88 * attenuation + 0.12 * _blur(attenuation, 0.10)
    scattered += view.detail * (attenuation - _blur(attenuation, 0.03))
    grain = random.normal(0, 1, (size, size)).astype(np.float32)
    scattered += view.noise * (0.6 + 0.6 * attenuation) * _blur(grain, 0.6 / 256) * 1.6
    grey = _logistic((scattered - view.exposure) / view.contrast)
    black = 1 / (1 + np.exp(view.exposure / view.contrast))
    image = np.clip((grey - black) / (1 - black) * 0.97 + 0.015, 0, 1).astype(np.float32)
    image = _add_marker(image, view)
    left, top, right, bottom = (round(border * size) for border in view.collimation)
    shutter = np.zeros_like(image)
    shutter[top : size - bottom, left : size - right] = 1
    return np.round(255 * image * (0.03 + 0.97 * _blur(shutter, 0.0025))).astype(np.uint8)


def _add_marker(image: Map, view: View) -> Map:
    """Add the lead letter of the side: R on the left of the image, L on the right."""
    if not view.marker:
        return image
    size = image.shape[0]
    lead = np.zeros((size, size), np.uint8)
    x = view.marker_at[0] if view.marker == "R" else 1 - view.marker_at[0] - 0.05
    origin = (round(x * size), round((view.marker_at[1] + 0.05) * size))
    cv2.putText(lead, view.marker, origin, cv2.FONT_HERSHEY_DUPLEX, size / 480, 255, max(1, size // 170), cv2.LINE_AA)
    letter = _blur(lead / 255, 0.6 / 256)
    return _as_map(image + (0.93 - image) * np.minimum(letter, 1))


def _write(path: Path, pixels: NDArray[np.uint8], options: list[int]) -> None:
    """Encode the image in the format of the path's suffix and write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, content = cv2.imencode(path.suffix, pixels, options)
    assert encoded, path
    path.write_bytes(content.tobytes())
