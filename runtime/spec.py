"""Frozen, typed records of what crosses a boundary: ports, preprocessing, calibration, manifest, limits.

All of them are `msgspec.Struct`s: reading JSON into one checks every field, and unknown fields are refused,
so a record of a newer schema can never be half understood. Canonical JSON (sorted keys, no white space,
UTF-8) makes the same content always the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

CONTRACT = 1
"""Version of the graph contract: what trunk and head take and give."""

MANIFEST_SCHEMA = 1
"""Version of the bundle's manifest."""

PACK_SCHEMA = 1
"""Version of the knowledge pack's header."""

Dtype = Literal["uint8", "float16", "float32", "int32", "int64", "uint64"]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")]
"""Products, ports, engines: letters, digits, '.', '_', '-'; no path can be made of it."""
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""A SHA-256 in lower-case hex."""
Pixels = Annotated[int, Meta(ge=1, le=65536)]


class Limits(Struct, frozen=True):
    """What edgead is willing to read, with units. Bigger is refused before it is held in memory."""

    image_bytes: int = 256 * 2**20
    """Encoded size of one image file."""
    image_pixels: int = 20000 * 20000
    """Width times height of one decoded image."""
    manifest_bytes: int = 4 * 2**20
    pack_bytes: int = 4 * 2**30
    pack_header_bytes: int = 16 * 2**20
    delta_bytes: int = 256 * 2**20
    """A delta's content once it is unpacked; a larger change travels as a whole pack."""
    bank_rows: int = 10_000_000
    bundle_files: int = 1000
    bundle_bytes: int = 16 * 2**30


DEFAULT_LIMITS = Limits()


class Port(Struct, frozen=True, forbid_unknown_fields=True):
    """One named array at the border of a graph.

    `shape` holds sizes and symbols: `B` is the batch; other symbols (`N`, `M`, ...) are row counts that
    change with the knowledge.
    """

    name: Name
    dtype: Dtype
    shape: tuple[int | str, ...]


class KnowledgePort(Struct, frozen=True, forbid_unknown_fields=True):
    """One named knowledge array that a head takes.

    A bank (first dimension a symbol) names in `rows` the int32 [1] input that carries its count of valid
    rows, so that an engine with static shapes can pad it; padded rows change no reduction. A bank may be
    empty only where `empty_ok`: an engine then gets one padded row and a count of 0.
    """

    name: Name
    dtype: Dtype
    shape: tuple[int | str, ...]
    rows: Name | None = None
    empty_ok: bool = False
    min_rows: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    """Fewest valid rows of a bank that is not empty."""


class Region(Struct, frozen=True, forbid_unknown_fields=True):
    """A rectangle in pixels of the (rotated) source frame: left, top, width, height."""

    x: Annotated[int, Meta(ge=0, le=65536)]
    y: Annotated[int, Meta(ge=0, le=65536)]
    width: Pixels
    height: Pixels


class Tiling(Struct, frozen=True, forbid_unknown_fields=True):
    """A grid of equal tiles over the region of interest; neighbours share `overlap` of a tile's side."""

    columns: Annotated[int, Meta(ge=1, le=64)]
    rows: Annotated[int, Meta(ge=1, le=64)]
    overlap: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.1


class Preprocessing(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to a frame before the trunk, in this order: rotate, crop, tile, resize.

    `width` and `height` are the engine's frame in pixels. Colour scaling is inside the graph.
    """

    width: Pixels
    height: Pixels
    rotate: Literal[0, 90, 180, 270] = 0
    """Clockwise degrees."""
    roi: Region | None = None
    tiles: Tiling | None = None


class DetectorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A detector as its graphs' border: trunk (image -> features), head (features, knowledge -> outputs).

    Graph inputs and outputs come in the order given here; in a head the features come first, then each
    knowledge array, directly followed by its `rows` count if it has one.
    """

    contract: int
    method: Name
    preprocessing: Preprocessing
    features: tuple[Port, ...]
    knowledge: tuple[KnowledgePort, ...]
    outputs: tuple[Port, ...]
    fingerprint: Digest
    """Feature-space fingerprint: see `fingerprint_of`. A pack fits a trunk only if they are equal."""

    @property
    def image(self) -> Port:
        """The trunk's input: uint8 RGB [B, height, width, 3]."""
        size = self.preprocessing
        return Port("image", "uint8", ("B", size.height, size.width, 3))

    @property
    def has_map(self) -> bool:
        """Whether the head gives an `anomaly_map`."""
        return any(port.name == "anomaly_map" for port in self.outputs)

    def head_inputs(self) -> tuple[Port, ...]:
        """The head's inputs in graph order: features, then knowledge with its row counts."""
        ports: list[Port] = list(self.features)
        for port in self.knowledge:
            ports.append(Port(port.name, port.dtype, port.shape))
            if port.rows is not None:
                ports.append(Port(port.rows, "int32", (1,)))
        return tuple(ports)


class Calibration(Struct, frozen=True, forbid_unknown_fields=True):
    """Where normal ends, learned from held-out normal images. Knowledge, never part of a graph.

    A frame is NG if its image score is greater than `threshold`. `map_threshold` outlines regions.
    """

    threshold: float
    map_threshold: float | None = None
    typical: float = 0.0
    """Median image score of the held-out normals; with `threshold` it fixes the normalised score."""
    held_out: int = 0
    """How many held-out normal images (or augmented views) the threshold rests on."""
    false_alarm_rate: float | None = None
    """The wanted share of normal frames called NG."""
    false_alarm_bound: float | None = None
    """Upper 95 % confidence bound of the true share, given `held_out` images."""

    def normalise(self, score: float) -> float:
        """The image score on a 0..1 scale: 0.5 at the threshold, 0.1 for a typical normal part.

        Linear and clipped, so scores of different products can share one chart.
        """
        step = max(self.threshold - self.typical, 1e-12) / 0.4
        return min(1.0, max(0.0, 0.5 + (score - self.threshold) / step))


Precision = Literal["fp32", "fp16", "int8"]
TargetName = Literal["onnx", "openvino", "tensorrt"]


class DeviceMatch(Struct, frozen=True, forbid_unknown_fields=True):
    """What a compiled TensorRT plan was built for; it runs only where all of it is equal."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    library_version: str
    compute_capability: str
    """Such as '8.6'; for plans of TensorRT for RTX possibly several, comma-separated."""
    gpu: str | None = None
    """Product name of the GPU it was built on; None for a plan that was compiled ahead of time."""


class Tolerance(Struct, frozen=True, forbid_unknown_fields=True):
    """How far an engine may be from torch: absolute, as a share of the reference map's range."""

    score: float
    map: float


class ParityFigures(Struct, frozen=True, forbid_unknown_fields=True):
    """Largest differences seen between an engine and torch over the golden images (shares of range)."""

    images: int
    score: float
    map: float
    decisions_changed: int


class NormalityGraphs(Struct, frozen=True, forbid_unknown_fields=True):
    """The second pair of graphs of an engine: what a normal variation named by a sentence looks like."""

    trunk: str
    """Path inside the bundle; that of the engine's own trunk where the two are one."""
    head: str
    tolerance: Tolerance | None = None
    parity: ParityFigures | None = None
    """Under an empty and under a filled table; None where the engine could not be executed."""


class EngineRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One engine of a bundle: files of trunk and head and what is known about them."""

    name: Name
    """Such as 'onnx-fp32'."""
    target: TargetName
    precision: Precision
    trunk: str
    head: str
    """Paths inside the bundle."""
    made_with: str
    """Library and version that compiled it."""
    capacity: dict[str, int] = msgspec.field(default_factory=dict)
    """Static engines: rows that each bank is padded to."""
    match: DeviceMatch | None = None
    recipe: bool = False
    """True if the files are ONNX that the device compiles with `edgead compile`."""
    tolerance: Tolerance | None = None
    parity: ParityFigures | None = None
    """None where the engine could not be executed when the bundle was made."""
    normality: NormalityGraphs | None = None
    """In a bundle that can be told normal variations by sentences."""


class GoldenRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One golden image (engine-sized) and what torch said of it under the initial pack."""

    path: str
    score: float
    anomalous: bool


class NormalityRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """The second detector of a bundle. Its head takes `normality.table` and its company, and its anomaly map,
    0 to 1, says how much of the first detector's map is to be suppressed where."""

    detector: DetectorSpec
    model: str | None = None
    """Name of the vision-language model, whose text encoder makes the rows."""
    weights: Digest | None = None
    """Digest of that model's weights: rows of another model mean nothing here."""
    shared_trunk: bool = False
    """Whether one run of the trunk feeds both heads."""


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 of one file of a bundle."""

    size: int
    sha256: Digest


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The bundle's table of contents; every other file is listed in `files` with its digest."""

    schema: int
    edgead: str
    """Version of edgead that wrote it."""
    name: Name
    detector: DetectorSpec
    engines: tuple[EngineRecord, ...]
    packs: dict[str, str]
    """Product -> path of its initial knowledge pack; the first product named in `default`."""
    default: Name
    golden: tuple[GoldenRecord, ...]
    files: dict[str, FileRecord]
    normality: NormalityRecord | None = None

    @property
    def knowing(self) -> DetectorSpec:
        """The detector as its knowledge packs see it: with the ports and the fingerprint of both detectors."""
        return self.detector if self.normality is None else with_normality(self.detector, self.normality.detector)


Record = TypeVar("Record", bound=Struct)


def canonical_json(value: Any) -> bytes:
    """`value` as JSON with sorted keys, no white space, UTF-8: the same content, the same bytes.

    Floats are written as Python's `repr` does: the shortest digits that read back as the same number.
    msgspec's own spelling of floats is not part of its contract, and digests outlive its versions.

    Raises:
        ValueError: a NaN or an infinity; JSON has none.
    """
    content = msgspec.to_builtins(value, str_keys=True)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def fingerprint_of(*, weights: bytes, preprocessing: Preprocessing, features: tuple[Port, ...]) -> str:
    """Feature-space fingerprint: SHA-256 over what makes two rows comparable, as 64 hex digits.

    Args:
        weights: SHA-256 digest (32 bytes) of the trunk's weights and graph.
        preprocessing: as declared; another region of interest is another feature space.
        features: the trunk's outputs.
    """
    content = {
        "contract": CONTRACT,
        "features": [msgspec.to_builtins(port) for port in features],
        "preprocessing": msgspec.to_builtins(preprocessing),
        "weights": weights.hex(),
    }
    return hashlib.sha256(b"edgead/feature-space/v1\0" + canonical_json(content)).hexdigest()


def with_normality(detector: DetectorSpec, normality: DetectorSpec) -> DetectorSpec:
    """What a pack must fit in a bundle of two detectors: the knowledge of both, in their combined feature space.

    Symbols of the second detector's shapes get a prefix, since its `K` has nothing to do with one of the first.
    """
    second = tuple(
        msgspec.structs.replace(
            port, shape=tuple(f"normality.{size}" if isinstance(size, str) else size for size in port.shape)
        )
        for port in normality.knowledge
    )
    return msgspec.structs.replace(
        detector,
        knowledge=(*detector.knowledge, *second),
        fingerprint=combined_fingerprint(detector.fingerprint, normality.fingerprint),
    )


def combined_fingerprint(detector: str, normality: str) -> str:
    """Feature-space fingerprint of packs that feed two detectors, as 64 hex digits: SHA-256 over the domain tag
    `edgead/feature-space-with-normality/v1`, a NUL, and the canonical JSON of both fingerprints."""
    content = canonical_json({"detector": detector, "normality": normality})
    return hashlib.sha256(b"edgead/feature-space-with-normality/v1\0" + content).hexdigest()
