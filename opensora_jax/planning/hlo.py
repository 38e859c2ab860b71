"""Reads from the text of a compiled program what it computes and communicates, loops included.

The compiler's own count (`compiled.cost_analysis()`) takes a loop's body once, and does not say
what goes over the network.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# Instructions that move no bytes themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
}
_SLICES = {"slice", "slice-start", "dynamic-slice", "gather"}
_CONTROL = {"while", "conditional", "call", "async-start"}


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool  # else in a core's own memory

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.dims) * (int(bits[0]) if bits else 8) // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # a tuple's elements in a row
    operands: tuple[str, ...]
    text: str  # from the opcode on
    is_root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf'\b{name}=(?:"([^"]*)"|([^\s,]+))', self.text)
        return found and (found[1] or found[2])

    @property
    def called(self) -> list[str]:
        found = re.findall(
            r"\b(?:calls|to_apply|body|condition|\w*computations?)=(\{[^}]*\}|%[\w.\-]+)", self.text
        )
        return re.findall(r"%([\w.\-]+)", " ".join(found))


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """What one device sends or receives by one instruction, and how often a step runs it."""

    kind: str  # one of COLLECTIVES
    shapes: tuple[Shape, ...]  # whole: after gathering, before reducing
    groups: np.ndarray  # (n_groups, size): devices, by their place in the mesh, that take part
    count: int
    gathers: bool  # though an all-reduce: each device has a part, and zeros around it

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def largest(self) -> Shape:
        return max(self.shapes, key=lambda shape: shape.bytes)


class Program:
    """A compiled program.

    Args:
      text: `compiled.as_text()`.
      n_devices: that it runs on.
    """

    def __init__(self, text: str, n_devices: int):
        self._n_devices = n_devices
        self._computations, entry = _parse(text)
        self.unknown_loops: list[str] = []  # counted once
        self._counts: dict[str, int] = collections.Counter({entry: 1})
        self._fused: set[str] = set()
        # The text defines a computation before those that call it.
        for name in reversed(self._computations):
            self._count_calls(name)

    def _count_calls(self, caller: str) -> None:
        for instruction in self._computations[caller].values():
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # the rest of what its start counts
            trips = self._trips(instruction) if instruction.opcode == "while" else 1
            for name in instruction.called:
                self._counts[name] += self._counts[caller] * trips
                if instruction.opcode not in _CONTROL or caller in self._fused:
                    self._fused.add(name)

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1])
        # A scan counts from zero to a constant.
        condition = self._computations[loop.attribute("condition").lstrip("%")]
        root = next(i for i in condition.values() if i.is_root)
        limits = [re.match(r"constant\((\d+)\)", condition[name].text) for name in root.operands]
        limits = [int(found[1]) for found in limits if found]
        if len(limits) == 1 and root.attribute("direction") == "LT":
            return limits[0]
        self.unknown_loops.append(loop.name)
        return 1

    def _running(self) -> Iterator[tuple[str, Computation, int]]:
        """(name, computation, how often a step runs it)."""
        for name, computation in self._computations.items():
            if self._counts[name]:
                yield name, computation, self._counts[name]

    def collectives(self) -> list[Collective]:
        found, chains = [], set()
        for name, computation, count in self._running():
            for instruction in computation.values():
                kind = instruction.opcode.removesuffix("-start")
                # A TPU runs one in pieces beside other work; its pieces name the same chain.
                chain = instruction.attribute("chain_id")
                if kind not in COLLECTIVES or (chain and chain in chains):
                    continue
                chains.add(chain)
                n = len(instruction.operands)
                shapes = tuple(s for x in instruction.operands for s in computation[x].shapes)
                if kind == "all-gather":
                    shapes = instruction.shapes[n if instruction.opcode != kind else 0 :][:n]
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # as a TPU does it: one operation, not two
                found.append(
                    Collective(
                        kind=kind,
                        shapes=shapes,
                        groups=_groups(instruction.text, self._n_devices),
                        count=count,
                        gathers=all(
                            self._is_placed(computation[x], computation)
                            for x in instruction.operands
                        ),
                    )
                )
        return found

    def _is_placed(self, value: Instruction, computation: Computation) -> bool:
        """Whether a value is a part written into something larger."""
        while value.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
            value = computation[value.operands[0]]
        if value.opcode == "fusion":
            inner = self._computations[value.called[0]]
            return self._is_placed(next(i for i in inner.values() if i.is_root), inner)
        return value.opcode == "dynamic-update-slice"

    def attention_flops(self) -> float:
        """FLOPs of a device's splash attention kernels, which the compiler does not count."""
        return sum(
            count * _attention_flops(instruction, computation)
            for _, computation, count in self._running()
            for instruction in computation.values()
        )

    def matmul_flops(self, *, loops: bool = True) -> float:
        """FLOPs of a device's matrix products and convolutions; without `loops` a body once."""
        return sum(
            (count if loops else 1) * _matmul_flops(instruction, computation)
            for _, computation, count in self._running()
            for instruction in computation.values()
        )

    def hbm_bytes(self) -> float:
        """Bytes that a device's instructions read from and write to its memory, loops included.

        Kernels count as if they read each operand once.
        """
        return sum(
            count * self._bytes(instruction, computation)
            for name, computation, count in self._running()
            if name not in self._fused
            for instruction in computation.values()
        )

    def _bytes(self, instruction: Instruction, computation: Computation) -> int:
        opcode = instruction.opcode
        is_kernel = instruction.attribute("custom_call_target") == "tpu_custom_call"
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        if opcode == "custom-call" and not is_kernel:
            return 0  # places buffers, or waits
        given = [computation[name].shapes for name in instruction.operands]
        made = instruction.shapes
        if opcode.endswith("-start"):
            made = made[:1] if opcode == "copy-start" else made[len(given) :][: len(given)]
        if opcode != "fusion":
            parameters = [computation[name] for name in dict.fromkeys(instruction.operands)]
            given = [parameter.shapes for parameter in parameters]  # one given twice is read once
            results = [instruction] * len(made)
            inner = {i.name: i for i in (*parameters, instruction)}
        else:
            inner = self._computations[instruction.called[0]]
            parameters = _parameters(inner)
            root = next(i for i in inner.values() if i.is_root)
            results = [inner[x] for x in root.operands] if root.opcode == "tuple" else [root]
            if len(results) != len(made):
                results = [root] * len(made)
        # What only passes through is neither read nor written.
        aliases = re.findall(r"\{(\d*)\}: \((\d+), \{", instruction.text)
        passed = {int(i or 0): int(j) for i, j in aliases}
        passed = {i: j for i, j in passed.items() if _update(results[i], inner) is None}
        total = 0
        for j, (shapes, parameter) in enumerate(zip(given, parameters, strict=True)):
            if j not in passed.values() and all(shape.in_hbm for shape in shapes):
                total += self._read(parameter, inner)
        for i, (shape, result) in enumerate(zip(made, results, strict=True)):
            if i not in passed and shape.in_hbm:
                update = _update(result, inner)
                total += shape.bytes if update is None else update
        return total

    def _read(self, value: Instruction, computation: Computation) -> int:
        """Bytes read of a value: only slices, where all that uses it takes slices."""
        whole = sum(s.bytes for s in value.shapes)
        total = 0
        for user in computation.values():
            if value.name not in user.operands:
                continue
            if user.opcode == "bitcast":
                total += self._read(user, computation)
            elif user.opcode == "fusion":
                inner = self._computations[user.called[0]]
                used = zip(user.operands, _parameters(inner), strict=True)
                total += sum(self._read(p, inner) for name, p in used if name == value.name)
            elif user.opcode in _SLICES and user.operands[0] == value.name:
                total += user.shapes[1 if user.opcode.endswith("-start") else 0].bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
                return whole
        return min(total, whole)


def _update(result: Instruction, computation: Computation) -> int | None:
    """Bytes that a result changes in place, where it is an update of a slice."""
    while result.opcode == "bitcast":
        result = computation[result.operands[0]]
    if result.opcode != "dynamic-update-slice":
        return None
    return sum(s.bytes for s in computation[result.operands[1]].shapes)


def _parameters(computation: Computation) -> list[Instruction]:
    """Its parameters, in order."""
    found = [i for i in computation.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(re.match(r"parameter\((\d+)\)", i.text)[1]))


def _matmul_flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    lhs, rhs = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        return 2.0 * math.prod(out) * math.prod(lhs[int(i)] for i in found[1].split(",") if i)
    # TPUs make convolutions of all products, batch dimensions becoming windows full of padding.
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")).groups()
    sizes = [dict(zip(*pair, strict=True)) for pair in zip(labels, (lhs, rhs, out), strict=True)]
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    flops = 2.0 * sizes[1]["i"] * sizes[2]["b"] * sizes[2]["f"]
    for axis in (label for label in sizes[0] if label.isdigit()):
        values = {name: value.split("x")[int(axis)] for name, value in fields.items()}
        flops *= _valid_positions(sizes[0][axis], sizes[2][axis], values)
    return flops


# Products of an (N, S) matrix by (., K) ones, of the pass forward and of the two backward.
_ATTENTION_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}


def _attention_flops(instruction: Instruction, computation: Computation) -> float:
    found = re.match(r"splash_mha_(fwd|dkv|dq)_", instruction.name)
    if not found or instruction.opcode != "custom-call":
        return 0.0
    # Queries and keys, (B, H, N, K) and (B, H, S, K), come after two tables of blocks.
    query, key = (computation[name].shapes[0].dims for name in instruction.operands[2:4])
    return 2.0 * math.prod(query) * key[-2] * _ATTENTION_PRODUCTS[found[1]]


def _valid_positions(n_in: int, n_out: int, window: dict[str, str]) -> int:
    """Pairs of output and kernel positions along an axis that meet an input, not padding."""
    dilation = int(window.get("lhs_dilate", 1))
    kernel = np.arange(int(window.get("size", 1))) * int(window.get("rhs_dilate", 1))
    starts = np.arange(n_out) * int(window.get("stride", 1))
    at = starts[:, None] + kernel - int(window.get("pad", "0_0").split("_")[0])
    return int(((at >= 0) & (at <= (n_in - 1) * dilation) & (at % dilation == 0)).sum())


def _groups(text: str, n_devices: int) -> np.ndarray:
    """(n_groups, size) from any of the ways in which XLA writes them."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return np.array(re.findall(r"(\d+),(\d+)", found[0]), int)
    if found := re.search(r"replica_groups=\{\{(.*?)\}\}", text):
        return np.array([row.split(",") for row in found[1].split("},{")], int)
    if found := re.search(r"replica_groups=\[([\d,]+)\](<=\S+)", text):
        return _iota(found[2]).reshape([int(n) for n in found[1].split(",")])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        chosen = re.findall(r"'(\w+)'", found[3])
        if ":" in found[3]:
            raise ValueError(f"replica_groups={found[3]}: expected whole axes")
        devices = _iota(found[2]) if "[" in found[2] else np.arange(n_devices)
        devices = devices.reshape([int(n) for n in axes.values()])
        order = [name for name in axes if name not in chosen] + chosen
        size = math.prod(int(axes[name]) for name in chosen)
        return devices.transpose([list(axes).index(name) for name in order]).reshape(-1, size)
    return np.arange(n_devices)[None]


def _iota(text: str) -> np.ndarray:
    """Devices in the order that "<=[2,4]T(1,0)" or "device_ids=([2,4]T(1,0))" says."""
    found = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    dims = [int(n) for n in found[1].split(",")]
    devices = np.arange(math.prod(dims)).reshape(dims)
    if found[2]:
        devices = devices.transpose([int(n) for n in found[2].split(",")])
    return devices.reshape(-1)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, name of the first that runs)."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
            end = _end_of_type(found[3])
            rest = found[3][end:].lstrip()
            opcode, operands = re.match(r"([\w\-]+)(\(.*)", rest).groups()
            operands = operands[: _closing(operands)]
            current[found[2]] = Instruction(
                name=found[2],
                opcode=opcode,
                shapes=_shapes(found[3][:end]),
                operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
                text=rest,
                is_root=bool(found[1]),
            )
    return computations, entry


def _end_of_type(text: str) -> int:
    if text.startswith("("):
        return _closing(text)
    return re.match(r"\w+\[[^\]]*\](\{[^}]*\})?", text).end()


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the first."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"{text[:80]!r}: expected a closing parenthesis")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text)
    return tuple(
        Shape(
            dtype=dtype,
            dims=tuple(int(n) for n in dims.split(",") if n),
            in_hbm=re.search(r"S\([1-9]\d*\)", layout) is None,
        )
        for dtype, dims, layout in found
    )
