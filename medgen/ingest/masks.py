"""Pictures and their masks, told apart and paired by folders and names.

images/a.jpg with masks/a.png, A/a.png with A/a_mask.png or A/a@.png, slices_train/case_1.png with
slices_seg_train/seg_1.png, images/a.jpg with annotations/trimaps/a.png, scan.nii with scan_seg.nii.gz.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence

IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "cxr_png"})
_MASK_FOLDERS = frozenset({"masks", "mask", "lung_masks", "lung_mask", "trimaps", "fsl_seg"})
_HALF_FOLDERS = frozenset({"leftmask", "rightmask"})  # Montgomery: each lung in a file of its own
_MASK_WORDS = frozenset({"seg", "mask", "masks"})  # slices_seg_train, where slices_train stands beside it
_MARKED = re.compile(r"(.+?)(?:[_-](?:mask|f?seg|segmentation)(?:_\d+)?|@)", re.IGNORECASE)
_SURELY_MARKED = re.compile(r".+_(?:mask|f?seg|segmentation)", re.IGNORECASE)  # no picture, even without its image
_RENAMED = ((re.compile(r"seg_(.+)"), r"case_\1"),)  # mask's name -> image's: OASIS slices

ORPHAN = "a mask without its image"
HALF = "a mask of one lung: join leftMask and rightMask in a folder masks"
NOT_LISTED = "not listed in manifest.csv"

Key = tuple[str, str]  # the place where an image and its mask meet, and the stem they share


class Pairs:
    """Files sorted into pictures, each with its mask, and what is neither.

    `listed` names the pictures where there is a manifest; `foreign` are the rest, each with the reason.
    """

    def __init__(self, paths: Sequence[str], listed: Container[str] | None = None) -> None:
        self.images: list[str] = []
        self.foreign: list[tuple[str, str]] = []
        self._folders = _Folders(paths)
        self._masks: dict[Key, str] = {}
        lone = self._match_by_stem(self._match_by_place(self._sort(paths, listed)))
        for path in lone:
            if listed is not None:
                self.foreign.append((path, NOT_LISTED))
            elif self._folders.holds_masks(path) or _SURELY_MARKED.fullmatch(stem(path)):
                self.foreign.append((path, ORPHAN))
            else:
                self.images.append(path)

    def mask_of(self, path: str) -> str | None:
        """The mask of one of `images`."""
        return self._masks.get(self._folders.key(path)) if self._masks else None

    def _sort(self, paths: Sequence[str], listed: Container[str] | None) -> list[str]:
        """Finds the pictures; returns what may be masks."""
        candidates = []
        for path in paths:
            if listed is not None and path in listed:
                self.images.append(path)
            elif self._folders.holds_halves(path):
                self.foreign.append((path, HALF))
            elif self._folders.holds_masks(path) or _MARKED.fullmatch(stem(path)):
                candidates.append(path)
            elif listed is None:
                self.images.append(path)
            else:
                self.foreign.append((path, NOT_LISTED))
        return candidates

    def _match_by_place(self, candidates: Sequence[str]) -> list[str]:
        """Gives each picture the mask that stands where it should; returns the masks left over."""
        asked = {key for path in candidates for key in self._keys(path)}  # few: memory is for the pictures
        there = {key for path in self.images if (key := self._folders.key(path)) in asked} if asked else set()
        lone = []
        for path in candidates:
            found = next((key for key in self._keys(path) if key in there), None)
            if found is None:
                lone.append(path)
            else:
                self._give(found, path)
        return lone

    def _match_by_stem(self, candidates: Sequence[str]) -> list[str]:
        """As before, by the name alone: where one place above the mask's or below it has such a picture."""
        asked = {name for path in candidates for _, name in self._keys(path)}
        places: dict[str, set[str]] = defaultdict(set)
        for path in self.images if asked else ():
            place, name = self._folders.key(path)
            if name in asked:
                places[name].add(place)
        lone = []
        for path in candidates:
            found = self._find_by_stem(path, places) if self._folders.holds_masks(path) else None
            if found is None:
                lone.append(path)
            else:
                self._give(found, path)
        return lone

    def _find_by_stem(self, path: str, places: Mapping[str, Collection[str]]) -> Key | None:
        for place, name in self._keys(path):
            others = [other for other in places.get(name, ()) if other.startswith(place) or place.startswith(other)]
            if len(others) == 1:
                return others[0], name
        return None

    def _give(self, key: Key, mask: str) -> None:
        first = self._masks.setdefault(key, mask)
        if first != mask:
            self.foreign.append((mask, f"a second mask of the image that has {first}"))

    def _keys(self, path: str) -> list[Key]:
        """Those of the pictures that a mask may belong to, the likeliest first."""
        place, name = self._folders.key(path)
        marked = _MARKED.fullmatch(name)
        stems = [marked[1]] if marked else []
        if self._folders.holds_masks(path):
            stems += [name, *(pattern.sub(image, name) for pattern, image in _RENAMED if pattern.fullmatch(name))]
        return [(place, each) for each in stems]


def folder_of(path: str) -> str:
    """The folder of a file, with the slash; "" at the top."""
    return path[: path.rfind("/") + 1]


def stem(path: str) -> str:
    """A file's name without its suffix, and without .nii or the like before .gz."""
    name = path[path.rfind("/") + 1 :]
    name = name[:-3] if name.lower().endswith(".gz") else name
    return name.rpartition(".")[0] or name


def plain(name: str) -> str:
    """A folder's name in lower case with underscores."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def bare_parts(folder: str) -> tuple[str, ...]:
    """The folders on the way to a file, without images/ and masks/: they say nothing of its class."""
    return tuple(part for part in folder.split("/") if part and plain(part) not in IMAGE_FOLDERS | _MASK_FOLDERS)


class _Folders:
    """What the folders hold. Each is looked at once: a dataset has many files and few folders."""

    def __init__(self, paths: Iterable[str]) -> None:
        folders = {folder_of(path) for path in paths}
        self._inside: dict[str, dict[str, str]] = defaultdict(dict)  # folder -> the folders in it, by plain name
        for folder in sorted(folders):
            parts = folder.split("/")[:-1]
            for at, part in enumerate(parts):
                self._inside["/".join(parts[:at])].setdefault(plain(part), part)
        self._meeting: dict[str, str] = {}
        self._masks: set[str] = set()
        self._halves: set[str] = set()
        for folder in folders:
            self._look_at(folder)

    def holds_masks(self, path: str) -> bool:
        return folder_of(path) in self._masks

    def holds_halves(self, path: str) -> bool:
        return folder_of(path) in self._halves

    def key(self, path: str) -> Key:
        return self._meeting[folder_of(path)], stem(path)

    def _look_at(self, folder: str) -> None:
        parts = folder.split("/")[:-1]
        partners = [self._partner("/".join(parts[:at]), part) for at, part in enumerate(parts)]
        if any(partners) or any(plain(part) in _MASK_FOLDERS for part in parts):
            self._masks.add(folder)
        if any(plain(part) in _HALF_FOLDERS for part in parts):
            self._halves.add(folder)
        meeting = "/".join(partner or part for part, partner in zip(parts, partners, strict=True))
        self._meeting[folder] = "".join(f"{part}/" for part in bare_parts(meeting))

    def _partner(self, parent: str, name: str) -> str | None:
        """The folder beside this one with the same name but for a word such as seg."""
        words = plain(name).split("_")
        bare = [word for word in words if word not in _MASK_WORDS]
        return self._inside[parent].get("_".join(bare)) if bare and len(bare) < len(words) else None
