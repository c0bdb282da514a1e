"""What ONNX Runtime offers for a problem: a graph of products and Softmax, and its Attention op."""
import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}


def peers(p, threads):
    if p.backward or p.rule:
        return {}
    return {"ONNX Runtime MatMul": lambda: session(p, threads, *products(p)),
            "ONNX Runtime Attention": lambda: session(p, threads, *attention(p))}


def products(p):
    """softmax(q k + bias) v, with groups folded, q scaled and k transposed beforehand."""
    fold, visible = p.folded()
    bias = p.bias(visible)
    inputs = {"q": fold(p.q * p.scale)} | ({} if bias is None else {"bias": bias})
    logits = "logits" if bias is None else "biased"
    nodes = [helper.make_node("MatMul", ["q", "k"], ["logits"])]
    nodes += [] if bias is None else [helper.make_node("Add", ["logits", "bias"], ["biased"])]
    nodes += [helper.make_node("Softmax", [logits], ["weights"], axis=-1), helper.make_node("MatMul", ["weights", "v"], ["o"])]
    return nodes, inputs, lambda k: k.mT.contiguous()


def attention(p):
    bias = None if p.is_causal else p.bias(p.visible)
    inputs = {"q": p.q} | ({} if bias is None else {"bias": bias})
    names = ["q", "k", "v"] + ([] if bias is None else ["bias"])
    return [helper.make_node("Attention", names, ["o"], is_causal=int(p.is_causal), scale=p.scale)], inputs, lambda k: k


def session(p, threads, nodes, inputs, of_k):
    """Runs the nodes on inputs that lie ready, and on k and v in turn."""
    if p.dtype not in TYPES:
        raise NotImplementedError(f"its CPU kernels have no {p.dtype}")
    keys = [{"k": of_k(k), "v": v} for k, v in p.copies]
    shapes = {name: list(x.shape) for name, x in (inputs | keys[0]).items()}
    info = lambda name, shape: helper.make_tensor_value_info(name, TYPES[p.dtype], shape)
    graph = helper.make_graph(nodes, "peer", [info(*item) for item in shapes.items()], [info("o", shapes["q"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Else its idle threads go on and take a core from whoever's turn it is.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    value = lambda x: onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
    o = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shapes["q"], np.float32 if p.dtype == "f32" else np.float16, "cpu")
    fixed, bindings = {name: value(x) for name, x in inputs.items()}, []
    for pair in keys:
        binding = made.io_binding()
        for name, x in (fixed | {name: value(x) for name, x in pair.items()}).items():
            binding.bind_ortvalue_input(name, x)
        binding.bind_ortvalue_output("o", o)
        bindings.append(binding)
    turn = 0

    def run():
        nonlocal turn
        turn += 1
        for _ in range(p.calls):
            made.run_with_iobinding(bindings[turn % len(bindings)])

    def results():
        run()
        return [torch.from_numpy(o.numpy().copy())]

    return run, results
