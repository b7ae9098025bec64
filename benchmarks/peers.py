"""Every way to run a MobileNet on a CPU that we measure ourselves against, behind one small interface (`Peer`).

The peers that need nothing but torch come with the package; ONNX Runtime and OpenVINO are added here. Both read the
same ONNX graph, made from the BN-folded model itself, so that all peers compute with the same weights.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from mbv2_kernels._bench.peers import (
    Compiled,
    Eager,
    Folded,
    Fused,
    FusedCompiled,
    Peer,
    PeerUnavailable,
    Run,
    fold_batch_norm,
)

OPSET = 18


def _inputs(node: fx.Node, names: dict[fx.Node, str]) -> list[str]:
    return [names[argument] for argument in node.args if isinstance(argument, fx.Node)]


def _convolution(node: fx.Node, args: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    defaults: list[Any] = [[1, 1], [0, 0], [1, 1], 1]
    stride, padding, dilation, groups = [*args[3:], *defaults[len(args) - 3 :]]
    kernel = list(args[1].meta["val"].shape[2:])
    if isinstance(padding, str):
        raise PeerUnavailable(f"no ONNX written for convolution padding {padding!r}")
    return "Conv", {
        "kernel_shape": kernel,
        "strides": list(stride),
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": groups,
    }


class _Graph:
    """Writes one exported program as ONNX, operator by operator."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names: dict[fx.Node, str] = {}

    def constant(self, name: str, value: Tensor) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def emit(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))

    def call(self, node: fx.Node) -> None:
        name = node.name
        operator = str(node.target).split(".")[1].removesuffix("_")
        inputs = _inputs(node, self.names)
        args: Any = node.args
        if operator == "conv2d":
            kind, attributes = _convolution(node, args)
            self.emit(kind, inputs, name, **attributes)
        elif operator in ("hardtanh", "relu6"):
            low, high = (0.0, 6.0) if operator == "relu6" else (*args[1:], *(-1.0, 1.0)[len(args) - 1 :])
            bounds = [self.constant(f"{name}.{i}", torch.tensor(float(b))) for i, b in enumerate((low, high))]
            self.emit("Clip", [*inputs, *bounds], name)
        elif operator in ("relu", "sigmoid") or (operator in ("add", "mul") and len(inputs) == 2 and not node.kwargs):
            self.emit(operator.capitalize(), inputs, name)
        elif operator == "adaptive_avg_pool2d" and list(args[1]) == [1, 1]:
            self.emit("GlobalAveragePool", inputs, name)
        elif operator == "mean":
            axes = self.constant(f"{name}.axes", torch.tensor(args[1]))
            self.emit("ReduceMean", [*inputs, axes], name, keepdims=int(len(args) > 2 and bool(args[2])))
        elif operator in ("flatten", "view", "reshape", "squeeze"):
            shape = self.constant(f"{name}.shape", torch.tensor(list(node.meta["val"].shape)))
            self.emit("Reshape", [*inputs, shape], name)
        elif operator == "pad" and (len(args) < 3 or args[2] == "constant"):
            pads = list(args[1])  # last dimension first: (left, right, top, bottom)
            before, after = [0, 0, *reversed(pads[0::2])], [0, 0, *reversed(pads[1::2])]
            self.emit("Pad", [*inputs, self.constant(f"{name}.pads", torch.tensor([*before, *after]))], name)
        elif operator == "linear":
            self.emit("Gemm", inputs, name, transB=1)
        elif operator in ("dropout", "feature_dropout", "clone", "contiguous", "alias", "detach"):
            self.names[node] = inputs[0]
            return
        else:
            raise PeerUnavailable(f"no ONNX written for {node.target}")
        self.names[node] = name


def onnx_model(model: nn.Module, example: Tensor) -> bytes:
    """`model` in eval mode, BatchNorm folded, as a serialised ONNX graph for inputs of `example`'s shape.

    Written from `torch.export`'s graph with `onnx.helper`: torch's own exporter needs onnxscript besides. Covers the
    operators of MobileNet-like classifiers; raises `PeerUnavailable` with the operator's name for any other.
    """
    from onnx import TensorProto, checker, helper

    program = torch.export.export(fold_batch_norm(model, example), (example,)).run_decompositions({})
    signature, graph = program.graph_signature, _Graph()
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    result = ""
    for node in program.graph.nodes:
        if node.op == "placeholder":
            graph.names[node] = node.name
            if node.name in stored:
                graph.constant(node.name, program.state_dict[stored[node.name]])
            elif node.name in lifted:
                graph.constant(node.name, program.constants[lifted[node.name]])
        elif node.op == "call_function":
            graph.call(node)
        elif node.op == "output":
            result = graph.names[node.args[0][0]]
            shape = list(node.args[0][0].meta["val"].shape)
    onnx = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "network",
            [helper.make_tensor_value_info(signature.user_inputs[0], TensorProto.FLOAT, list(example.shape))],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, shape)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    checker.check_model(onnx)
    return onnx.SerializeToString()


class _OnnxPeer(Peer):
    """A runtime that reads ONNX: `packages` are what it needs, its own first."""

    packages: tuple[str, ...]
    #: What it computes in, by the dtype of the model that it is compared with.
    precisions: Mapping[torch.dtype, str] = MappingProxyType({torch.float32: "f32"})

    def missing(self) -> str | None:
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"not installed (pip install {' '.join(absent)})" if absent else None

    def version(self) -> str:
        return metadata.version(self.packages[0])

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        dtype = example.dtype
        if dtype not in self.precisions or example.device.type != "cpu":
            dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.precisions)
            raise PeerUnavailable(f"measured in {dtypes} on the CPU only, not {dtype} on {example.device}")
        if dtype != torch.float32:  # the same numbers, in the float32 that its files and its pictures hold
            model, example = copy.deepcopy(model).float(), example.float()
        return self.load(onnx_model(model, example), example.contiguous(), threads, self.precisions[dtype])

    def load(self, onnx: bytes, example: Tensor, threads: int, precision: str) -> Run:
        raise NotImplementedError


class OnnxRuntime(_OnnxPeer):
    """ONNX Runtime, CPU provider, all graph optimisations."""

    name = "ONNX Runtime"
    packages = ("onnxruntime", "onnx")

    def load(self, onnx: bytes, example: Tensor, threads: int, precision: str) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its threads may spin while it runs, but not on into the turn of the next contestant.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: example.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])


class OpenVino(_OnnxPeer):
    """OpenVINO's CPU plugin: arithmetic of the model's dtype, latency hint, one stream."""

    name = "OpenVINO"
    packages = ("openvino", "onnx")
    precisions = MappingProxyType({torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"})

    def load(self, onnx: bytes, example: Tensor, threads: int, precision: str) -> Run:
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(onnx, b""),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": "1",
                "INFERENCE_NUM_THREADS": str(threads),
            },
        )
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(example.numpy(), shared_memory=True))

        def run() -> Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor().data)

        return run


PEERS: tuple[Callable[[], Peer], ...] = (Fused, FusedCompiled, Eager, Folded, Compiled, OnnxRuntime, OpenVino)
# Whole networks only: torch.compile would compile every block anew, and run out of its limit of compilations.
NETWORK_ONLY = (FusedCompiled, Compiled)


def network_peers(*, compiled: bool = True) -> list[Peer]:
    """All peers; without torch.compile's, which take a minute to prepare, if `compiled` is false."""
    return [peer() for peer in PEERS if compiled or peer not in NETWORK_ONLY]


def block_peers() -> list[Peer]:
    """The peers that single blocks are timed with."""
    return network_peers(compiled=False)
