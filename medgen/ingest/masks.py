"""Pair images with their masks and other paired images by folder and file name.

images/a.jpg with masks/a.png, A/a.png with A/a_mask.png or A/a@.png, slices_train/case_1.png with
slices_seg_train/seg_1.png, images/a.jpg with annotations/trimaps/a.png, scan.nii with scan_seg.nii.gz.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "cxr_png"})
_MASK_FOLDERS = frozenset({"masks", "mask", "lung_masks", "lung_mask", "trimaps", "fsl_seg"})
_SINGLE_LUNG_FOLDERS = frozenset({"leftmask", "rightmask"})  # Montgomery: one file per lung
_MASK_WORDS = frozenset({"seg", "mask", "masks"})  # slices_seg_train, if slices_train exists next to it
_MASK_NAME = re.compile(r"(.+?)(?:[_-](?:mask|f?seg|segmentation)(?:_\d+)?|@)", re.IGNORECASE)
# A file with such a name is a mask even if its image is missing.
_CERTAIN_MASK_NAME = re.compile(r".+_(?:mask|f?seg|segmentation)", re.IGNORECASE)
_UID = re.compile(r"\d+(\.\d+){3,}")  # as a name of files and folders
_IMAGE_NAME_OF_MASK = ((re.compile(r"seg_(.+)"), r"case_\1"),)  # OASIS slices

UNPAIRED_MASK = "a mask without its image"
SINGLE_LUNG_MASK = "a mask of one lung: join leftMask and rightMask in a folder masks"
NOT_LISTED = "not listed in manifest.csv"

_Key = tuple[str, str]  # normalised folder and file stem that an image shares with its mask


class MaskPairs:
    """Image files, the mask of each, and the other files.

    If there is a manifest, `listed` contains its images. `other_files` are paths and reasons.
    """

    def __init__(self, paths: Sequence[str], listed: Container[str] | None = None) -> None:
        self.images: list[str] = []
        self.other_files: list[tuple[str, str]] = []
        self._folders = _Folders(paths)
        self._masks: dict[_Key, str] = {}
        unpaired = self._match_by_stem(self._match_by_folder(self._find_images(paths, listed)))
        for path in unpaired:
            if listed is not None:
                self.other_files.append((path, NOT_LISTED))
            elif self._folders.holds_masks(path) or _CERTAIN_MASK_NAME.fullmatch(stem(path)):
                self.other_files.append((path, UNPAIRED_MASK))
            else:
                self.images.append(path)

    def mask_of(self, path: str) -> str | None:
        """The mask of one of `images`."""
        return self._masks.get(self._folders.key(path)) if self._masks else None

    def _find_images(self, paths: Sequence[str], listed: Container[str] | None) -> list[str]:
        """Collect the images; return the files that may be masks."""
        candidates = []
        for path in paths:
            if listed is not None and path in listed:
                self.images.append(path)
            elif self._folders.holds_single_lungs(path):
                self.other_files.append((path, SINGLE_LUNG_MASK))
            elif self._folders.holds_masks(path) or _MASK_NAME.fullmatch(stem(path)):
                candidates.append(path)
            elif listed is None:
                self.images.append(path)
            else:
                self.other_files.append((path, NOT_LISTED))
        return candidates

    def _match_by_folder(self, candidates: Sequence[str]) -> list[str]:
        """Pair masks with images of a corresponding folder; return the masks that are left."""
        # Restricting the set to keys of masks saves memory: there may be millions of images.
        wanted = {key for path in candidates for key in self._keys(path)}
        present = {key for path in self.images if (key := self._folders.key(path)) in wanted} if wanted else set()
        return self._pair_all(candidates, lambda path: next((key for key in self._keys(path) if key in present), None))

    def _match_by_stem(self, candidates: Sequence[str]) -> list[str]:
        """Pair masks with images of the same name if exactly one folder above or below the mask's has such an image."""
        wanted = {name for path in candidates for _, name in self._keys(path)}
        folders: dict[str, set[str]] = defaultdict(set)
        for path in self.images if wanted else ():
            folder, name = self._folders.key(path)
            if name in wanted:
                folders[name].add(folder)
        return self._pair_all(candidates, lambda path: self._find_by_stem(path, folders))

    def _find_by_stem(self, path: str, folders: Mapping[str, Collection[str]]) -> _Key | None:
        for folder, name in self._keys(path) if self._folders.holds_masks(path) else ():
            others = [other for other in folders.get(name, ()) if other.startswith(folder) or folder.startswith(other)]
            if len(others) == 1:
                return others[0], name
        return None

    def _pair_all(self, candidates: Sequence[str], find: Callable[[str], _Key | None]) -> list[str]:
        """Pair masks with the images that `find` gives; return the masks without one."""
        unpaired = []
        for mask in candidates:
            key = find(mask)
            if key is None:
                unpaired.append(mask)
            elif (first := self._masks.setdefault(key, mask)) != mask:
                self.other_files.append((mask, f"a second mask of the image that has {first}"))
        return unpaired

    def _keys(self, path: str) -> list[_Key]:
        """Keys of the images that a mask may belong to, the most likely first."""
        folder, name = self._folders.key(path)
        match = _MASK_NAME.fullmatch(name)
        stems = [match[1]] if match else []
        if self._folders.holds_masks(path):
            stems += [name, *(p.sub(image, name) for p, image in _IMAGE_NAME_OF_MASK if p.fullmatch(name))]
        return [(folder, each) for each in stems]


def in_folder(path: str, folder: str) -> bool:
    """True if a file is in a folder of this name, or below one."""
    return any(normalize_name(part) == normalize_name(folder) for part in path.split("/")[:-1])


def pair_images(images: Iterable[str], paired: Iterable[str], folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Image files to their paired files below folders of a name, and the reasons for the paired files that are left.

    A file belongs to the image of the same name, in the same folder but for `folder`, images/ and the like:
    edges/NORMAL/a.png or NORMAL/edges/a.png to images/NORMAL/a.jpg.
    """

    def key(path: str) -> tuple[tuple[str, ...], str]:
        folders = label_folders(folder_of(path))
        return tuple(part for part in folders if normalize_name(part) != normalize_name(folder)), stem(path)

    others: dict[str, str] = {}
    found: dict[tuple[tuple[str, ...], str], str] = {}
    for path in sorted(paired):
        if (first := found.setdefault(key(path), path)) != path:
            others[path] = f"a second file in {folder} of the image that has {first}"
    pairs = {image: found[own] for image in images if (own := key(image)) in found}
    used = set(pairs.values())
    return pairs, others | {path: f"in {folder}, without its image" for path in found.values() if path not in used}


def folder_of(path: str) -> str:
    """The folder of a file with a trailing slash; "" at the top."""
    return path[: path.rfind("/") + 1]


def stem(path: str) -> str:
    """A file's name without its suffix; also without .nii or the like before .gz. A DICOM UID has no suffix."""
    name = path[path.rfind("/") + 1 :]
    if _UID.fullmatch(name):
        return name
    name = name[:-3] if name.lower().endswith(".gz") else name
    return name.rpartition(".")[0] or name


def normalize_name(name: str) -> str:
    """A folder's name in lower case with underscores."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def label_folders(folder: str) -> tuple[str, ...]:
    """The parts of a path that may be labels: all but images/, masks/ and the like."""
    ignored = IMAGE_FOLDERS | _MASK_FOLDERS
    return tuple(part for part in folder.split("/") if part and normalize_name(part) not in ignored)


class _Folders:
    """The role of each folder. Computed once per folder, as a dataset has many files and few folders."""

    def __init__(self, paths: Iterable[str]) -> None:
        folders = {folder_of(path) for path in paths}
        self._children: dict[str, dict[str, str]] = defaultdict(dict)  # folder -> its folders by normalised name
        for folder in sorted(folders):
            parts = folder.split("/")[:-1]
            for at, part in enumerate(parts):
                self._children["/".join(parts[:at])].setdefault(normalize_name(part), part)
        self._shared: dict[str, str] = {}  # folder -> the part of the key that images and masks share
        self._mask_folders: set[str] = set()
        self._single_lung_folders: set[str] = set()
        for folder in folders:
            self._classify(folder)

    def holds_masks(self, path: str) -> bool:
        return folder_of(path) in self._mask_folders

    def holds_single_lungs(self, path: str) -> bool:
        return folder_of(path) in self._single_lung_folders

    def key(self, path: str) -> _Key:
        return self._shared[folder_of(path)], stem(path)

    def _classify(self, folder: str) -> None:
        parts = folder.split("/")[:-1]
        image_folders = [self._image_folder("/".join(parts[:at]), part) for at, part in enumerate(parts)]
        if any(image_folders) or any(normalize_name(part) in _MASK_FOLDERS for part in parts):
            self._mask_folders.add(folder)
        if any(normalize_name(part) in _SINGLE_LUNG_FOLDERS for part in parts):
            self._single_lung_folders.add(folder)
        shared = "/".join(image_folder or part for part, image_folder in zip(parts, image_folders, strict=True))
        self._shared[folder] = "".join(f"{part}/" for part in label_folders(shared))

    def _image_folder(self, parent: str, name: str) -> str | None:
        """The sibling folder whose name is this one without a word such as seg."""
        words = normalize_name(name).split("_")
        others = [word for word in words if word not in _MASK_WORDS]
        return self._children[parent].get("_".join(others)) if others and len(others) < len(words) else None
