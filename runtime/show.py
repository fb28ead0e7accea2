"""What is in a bundle, a knowledge pack, a delta or a fitted detector: as a record, and as text for people.

A fitted detector is read without torch: only its JSON parts and its pack are opened.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import msgspec

from edgead.runtime.bundle import open_bundle
from edgead.runtime.bundle_manifest import NORMALITY_TABLE
from edgead.runtime.bundle_store import SUFFIX
from edgead.runtime.chain import read_delta_file
from edgead.runtime.deltas import MAGIC, is_delta
from edgead.runtime.errors import DetectorError, InputError, storage_errors
from edgead.runtime.knowledge import Pack, decode_pack, encode_pack, read_pack
from edgead.runtime.notes import is_note, read_note
from edgead.runtime.spec import DEFAULT_LIMITS, DetectorSpec, NormalityRecord, Preprocessing
from edgead.runtime.tables import bytes_text, table

Record = dict[str, Any]


def describe(path: Path) -> Record:
    """What is at `path`, as JSON-like values; `kind` is 'bundle', 'pack', 'delta' or 'detector'.

    Raises:
        InputError: nothing is there.
        BundleError, KnowledgeError, DetectorError: it is damaged.
        StorageError: it cannot be read.
    """
    if not path.exists():
        raise InputError(
            wanted=f"a bundle, knowledge pack or fitted detector at {path}",
            got="nothing there",
            next_step="Make a bundle with: edgead export --normal photos/good -o part.bundle",
        )
    if path.is_dir() or path.suffix == SUFFIX:
        return describe_bundle(path)
    with storage_errors(path, "to read a file"), open(path, "rb") as stream:
        start = stream.read(len(MAGIC))
    if is_delta(start):
        return describe_delta(path)
    return (
        describe_detector(path)
        if start.startswith(b"PK\x03\x04")
        else {"kind": "pack", **describe_pack(read_pack(path))}
    )


def describe_bundle(path: Path) -> Record:
    """A bundle, every file of it checked against its digest. Raises: see `open_bundle`."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    engines = []
    for record in manifest.engines:
        names = [name for name in manifest.files if name.startswith(f"engines/{record.name}/")]
        engines.append(
            {
                **msgspec.to_builtins(record),
                "bytes": sum(manifest.files[name].size for name in names),
                "files": {name: manifest.files[name].size for name in names},
            }
        )
    return {
        "kind": "bundle",
        "name": manifest.name,
        "edgead": manifest.edgead,
        "detector": _detector(manifest.detector),
        "normality": _normality(manifest.normality),
        "engines": engines,
        "default": manifest.default,
        "knowledge": [describe_pack(bundle.pack(product)) for product in bundle.products],
        "golden": {
            "images": len(manifest.golden),
            "anomalous": sum(record.anomalous for record in manifest.golden),
        },
        "files": len(manifest.files),
        "bytes": sum(record.size for record in manifest.files.values()),
    }


def describe_pack(pack: Pack) -> Record:
    """A knowledge pack; `arrays` by name with dtype and shape, row ids left out; `normalities` are sentences."""
    told = read_note(pack, NORMALITY_TABLE)["rows"] if NORMALITY_TABLE in pack.arrays else []
    arrays = {name: array for name, array in pack.arrays.items() if not name.endswith(".ids")}
    return {
        "product": pack.product,
        "version": pack.version,
        "digest": pack.digest,
        "fingerprint": pack.fingerprint,
        "bytes": len(encode_pack(pack)),
        "arrays": {name: {"dtype": a.dtype.name, "shape": list(a.shape)} for name, a in arrays.items()},
        "calibration": msgspec.to_builtins(pack.calibration),
        "normalities": [row["text"] for row in told],
    }


def describe_delta(path: Path) -> Record:
    """A delta between two packs: what it adds, takes out and replaces, by array.

    Raises:
        KnowledgeError: it is damaged.
        StorageError: it cannot be read.
    """
    delta = read_delta_file(path)
    put = delta.of("put")
    return {
        "kind": "delta",
        "product": delta.product,
        "fingerprint": delta.fingerprint,
        "base": delta.base,
        "result": delta.result,
        "bytes": path.stat().st_size,
        "rows_added": {name: len(ids) for name, ids in delta.of("ids").items()},
        "rows_deleted": {name: len(ids) for name, ids in delta.of("del").items()},
        "splices": {
            name: {"first": place[0], "out": place[1], "in": len(put[name]) if name in put else 1}
            for name, place in delta.splices.items()
        },
        "arrays_set": sorted(delta.of("set")),
        "arrays_removed": list(delta.removed),
        "calibration": msgspec.to_builtins(delta.calibration),
    }


def describe_detector(path: Path) -> Record:
    """A fitted-detector file.

    Raises:
        DetectorError: it is damaged or something else.
        KnowledgeError: its pack is damaged.
        StorageError: it cannot be read.
    """
    limits = DEFAULT_LIMITS
    with storage_errors(path, "to read a fitted detector"):
        try:
            with zipfile.ZipFile(path) as archive:
                spec = msgspec.json.decode(_member(archive, "detector.json", limits.manifest_bytes), type=DetectorSpec)
                card = msgspec.json.decode(_member(archive, "card.json", limits.manifest_bytes))
                pack = decode_pack(_member(archive, "knowledge.safetensors", limits.pack_bytes))
                sizes = {info.filename: info.file_size for info in archive.infolist()}
                golden = _golden(archive)
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, msgspec.MsgspecError, NotImplementedError) as error:
            raise DetectorError(
                wanted=f"a fitted-detector file at {path}",
                got=f"something damaged or foreign ({error})",
                next_step="Make it again with: edgead fit --normal DIR -o FILE",
            ) from error
    return {
        "kind": "detector",
        "detector": _detector(spec),
        "knowledge": [describe_pack(pack)],
        "golden": {"images": golden},
        "card": card,
        "files": len(sizes),
        "bytes": sum(sizes.values()),
    }


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > limit:
        raise ValueError(f"{name} of {info.file_size} bytes")
    return archive.read(info)


def _golden(archive: zipfile.ZipFile) -> int:
    """How many golden frames there are. The frames are small; their header alone would need a reader of its own."""
    data = _member(archive, "golden.safetensors", DEFAULT_LIMITS.pack_bytes)
    length = int.from_bytes(data[:8], "little")
    if length > DEFAULT_LIMITS.pack_header_bytes:
        raise ValueError("golden.safetensors with an oversized header")
    header = msgspec.json.decode(data[8 : 8 + length])
    return int(header["frames"]["shape"][0])


def _normality(record: NormalityRecord | None) -> Record | None:
    if record is None:
        return None
    return {
        **_detector(record.detector),
        "model": record.model,
        "weights": record.weights,
        "shared_trunk": record.shared_trunk,
    }


def _detector(spec: DetectorSpec) -> Record:
    return {
        "method": spec.method,
        "fingerprint": spec.fingerprint,
        "contract": spec.contract,
        "preprocessing": msgspec.to_builtins(spec.preprocessing),
        "features": [msgspec.to_builtins(port) for port in spec.features],
        "outputs": [port.name for port in spec.outputs],
    }


def as_text(record: Record) -> str:
    """A record of `describe` for people."""
    if record["kind"] == "delta":
        return _delta_text(record)
    parts = []
    if "detector" in record:
        parts.append(_head_text(record))
    if record.get("engines"):
        parts.append("engines\n" + "\n".join(_engine_text(engine) for engine in record["engines"]))
    packs = record.get("knowledge", [record])
    for pack in packs:
        first = record.get("default") == pack["product"] and len(packs) > 1
        parts.append(f"knowledge: {pack['product']}{' (default)' if first else ''}\n" + _pack_text(pack))
    if record.get("card"):
        lines = [[name, _value(value)] for name, value in record["card"].items()]
        parts.append("made from\n" + table(lines, indent="  ", right=False))
    return "\n\n".join(parts)


def _head_text(record: Record) -> str:
    detector = record["detector"]
    golden = record["golden"]
    images = f"{golden['images']} images"
    if "anomalous" in golden:
        images += f", {golden['anomalous']} of them anomalous"
    features = ", ".join(f"{port['name']} {port['dtype']} {_shape(port['shape'])}" for port in detector["features"])
    lines = [
        ["name", record["name"]] if "name" in record else ["kind", "fitted detector"],
        ["method", detector["method"]],
        ["feature space", detector["fingerprint"][:12]],
        ["frame", _frame_text(msgspec.convert(detector["preprocessing"], Preprocessing))],
        ["features", features],
        ["outputs", ", ".join(detector["outputs"])],
        ["golden", images],
        ["files", f"{record['files']}, {bytes_text(record['bytes'])} in all"],
    ]
    if record.get("normality"):
        second = record["normality"]
        weights = f", weights {second['weights'][:12]}" if second["weights"] else ""
        trunk = "shares the trunk" if second["shared_trunk"] else "with a trunk of its own"
        lines.append(["normality", f"{second['method']}, {second['model'] or 'model unknown'}{weights}, {trunk}"])
    if "edgead" in record:
        lines.append(["written by", f"edgead {record['edgead']}"])
    return table(lines, right=False)


def _frame_text(spec: Preprocessing) -> str:
    steps = []
    if spec.rotate:
        steps.append(f"rotated by {spec.rotate} degrees")
    if spec.roi is not None:
        steps.append(f"region {spec.roi.width} x {spec.roi.height} at {spec.roi.x},{spec.roi.y}")
    if spec.tiles is not None:
        tiles = spec.tiles
        steps.append(f"{tiles.columns} x {tiles.rows} tiles with {tiles.overlap:.0%} overlap")
    steps.append(f"resized to {spec.width} x {spec.height} px RGB")
    return ", ".join(steps)


def _engine_text(engine: Record) -> str:
    sizes = {name.split("/", 2)[-1]: size for name, size in engine["files"].items()}
    lines = [
        ["precision", engine["precision"]],
        ["made with", engine["made_with"]],
        ["size", f"{bytes_text(engine['bytes'])} ({', '.join(f'{n} {bytes_text(s)}' for n, s in sizes.items())})"],
        ["parity", _parity_text(engine)],
    ]
    if engine.get("normality"):
        lines.append(["normality", _parity_text({**engine, **engine["normality"]})])
    if engine.get("capacity"):
        lines.append(["capacity", ", ".join(f"{name} {rows} rows" for name, rows in engine["capacity"].items())])
    if engine.get("match"):
        match = engine["match"]
        gpu = f", {match['gpu']}" if match.get("gpu") else ""
        lines.append(
            [
                "runs on",
                f"compute capability {match['compute_capability']}{gpu} "
                f"with {match['library']} {match['library_version']}",
            ]
        )
    return f"  {engine['name']}\n" + table(lines, indent="    ", right=False)


def _parity_text(engine: Record) -> str:
    parity, tolerance = engine.get("parity"), engine.get("tolerance")
    if parity is None:
        return "to be compiled on the device: edgead compile" if engine.get("recipe") else "not executed yet"
    limits = f" (allowed {tolerance['score']:.1e}, {tolerance['map']:.1e})" if tolerance is not None else ""
    return (
        f"score off by {parity['score']:.1e}, map by {parity['map']:.1e} of their range{limits}; "
        f"{parity['decisions_changed']} of {parity['images']} decisions changed"
    )


def _pack_text(pack: Record) -> str:
    lines = [["version", f"{pack['version']} ({bytes_text(pack['bytes'])})"]]
    if "kind" in pack:
        lines.append(["feature space", pack["fingerprint"][:12]])
    for name, array in pack["arrays"].items():
        shape = array["shape"]
        if is_note(name):
            continue
        size = f"{shape[0]} rows x {shape[1]}" if name.startswith("bank.") else _shape(shape)
        lines.append([name, f"{size} {array['dtype']}"])
    if pack["normalities"]:
        lines.append(["normal too", ", ".join(f'"{text}"' for text in pack["normalities"])])
    calibration = pack["calibration"]
    lines.append(["threshold", f"{calibration['threshold']:.6g}"])
    if calibration.get("map_threshold") is not None:
        lines.append(["map threshold", f"{calibration['map_threshold']:.6g}"])
    lines.append(["false alarms", _false_alarm_text(calibration)])
    return table(lines, indent="  ", right=False)


def _delta_text(delta: Record) -> str:
    lines = [
        ["from", delta["base"][:12]],
        ["to", f"{delta['result'][:12]} ({bytes_text(delta['bytes'])})"],
        ["feature space", delta["fingerprint"][:12]],
    ]
    lines += [[name, f"{count} rows more"] for name, count in delta["rows_added"].items()]
    lines += [[name, f"{count} rows fewer"] for name, count in delta["rows_deleted"].items()]
    lines += [
        [name, f"{splice['in']} in the place of {splice['out']} from {splice['first']} on"]
        for name, splice in delta["splices"].items()
    ]
    lines += [[name, "set as a whole"] for name in delta["arrays_set"]]
    lines += [[name, "removed"] for name in delta["arrays_removed"]]
    lines.append(["threshold", f"{delta['calibration']['threshold']:.6g}"])
    return f"delta: {delta['product']}\n" + table(lines, indent="  ", right=False)


def _false_alarm_text(calibration: Record) -> str:
    held_out, rate = calibration["held_out"], calibration["false_alarm_rate"]
    bound = calibration["false_alarm_bound"]
    if not held_out:
        return "unknown: the threshold rests on no held-out images"
    text = f"set on {held_out} held-out normals"
    if rate is not None:
        text += f" for a rate of {rate:.2%}"
    if bound is not None:
        text += f"; with 95 % confidence at most {bound:.2%}"
    return text


def _shape(shape: list[Any]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
