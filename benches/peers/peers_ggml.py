"""What ggml offers for a problem: `ggml_flash_attn_ext` on the CPU, from a user's build (FAM_GGML: the folder of its shared libraries) or from
llama-cpp-python's, where that is installed. ggml keeps queries, logits and results in f32, whatever type its keys and values have."""
import ctypes
import importlib.util
import os
from pathlib import Path

import torch

TYPES = {"f32": 0, "f16": 1, "bf16": 30}
HEADER = 1 << 20  # Bytes for descriptions of tensors and of a graph.


class InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Plan(ctypes.Structure):
    """What comes behind is not looked at, and grows from version to version."""
    _fields_ = [("work_size", ctypes.c_size_t), ("work", ctypes.c_void_p), ("rest", ctypes.c_byte * 256)]


def folder():
    if "FAM_GGML" in os.environ:
        return Path(os.environ["FAM_GGML"])
    found = importlib.util.find_spec("llama_cpp")
    return Path(found.origin).parent / "lib" if found else None


def peers(p, threads):
    where = folder()
    if where is None or p.backward or p.rule:
        return {}
    return {"ggml flash_attn_ext": lambda: flash_attention(libraries(where), p, threads)}


def libraries(where):
    """ggml-base, and ggml-cpu with all that it needs."""
    base, cpu = (ctypes.CDLL(str(where / f"libggml-{name}.so"), ctypes.RTLD_GLOBAL) for name in ("base", "cpu"))
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for library, name, result, arguments in [
        (base, "ggml_init", pointer, [InitParams]),
        (base, "ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int] + 4 * [number]),
        (base, "ggml_get_data", pointer, [pointer]),
        (base, "ggml_flash_attn_ext", pointer, 5 * [pointer] + 3 * [real]),
        (base, "ggml_new_graph", pointer, [pointer]),
        (base, "ggml_build_forward_expand", None, 2 * [pointer]),
        (base, "ggml_threadpool_params_init", None, [pointer, ctypes.c_int]),
        (cpu, "ggml_threadpool_new", pointer, [pointer]),
        (cpu, "ggml_graph_plan", Plan, [pointer, ctypes.c_int, pointer]),
        (cpu, "ggml_graph_compute", ctypes.c_int, [pointer, ctypes.POINTER(Plan)]),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return base, cpu


def flash_attention(libraries, p, threads):
    base, cpu = libraries
    n, _, rows, d = p.q.shape
    bias = None if p.visible.all() else p.bias(p.visible).half()[None, None]
    held = [x for pair in p.copies for x in pair] + [p.q.float(), torch.zeros(n, p.heads, rows, d)] + ([] if bias is None else [bias])
    size = HEADER * (1 + len(p.copies)) + sum(x.numel() * x.element_size() for x in held)
    context = base.ggml_init(InitParams(size, None, False))

    def tensor(x, of_type):
        made = base.ggml_new_tensor_4d(context, TYPES[of_type], *reversed(x.shape))
        ctypes.memmove(base.ggml_get_data(made), x.data_ptr(), x.numel() * x.element_size())
        return made

    q, mask = tensor(p.q.float(), "f32"), None if bias is None else tensor(bias, "f16")
    params = ctypes.create_string_buffer(4096)
    base.ggml_threadpool_params_init(params, threads)
    pool = cpu.ggml_threadpool_new(params)
    graphs = []
    for k, v in p.copies:
        o = base.ggml_flash_attn_ext(context, q, tensor(k, p.dtype), tensor(v, p.dtype), mask, p.scale, 0.0, 0.0)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, o)
        plan = cpu.ggml_graph_plan(graph, threads, pool)
        work = ctypes.create_string_buffer(plan.work_size + 64)
        plan.work = ctypes.addressof(work)
        graphs.append((graph, plan, o, work))
    turn = 0

    def run():
        nonlocal turn
        turn += 1
        graph, plan, _, _ = graphs[turn % len(graphs)]
        for _ in range(p.calls):
            if cpu.ggml_graph_compute(graph, ctypes.byref(plan)):
                raise RuntimeError("ggml_graph_compute failed")

    def results():
        run()
        got = torch.empty(n, rows, p.heads, d)
        ctypes.memmove(got.data_ptr(), base.ggml_get_data(graphs[turn % len(graphs)][2]), 4 * got.numel())
        return [got.transpose(1, 2)]

    return run, results
