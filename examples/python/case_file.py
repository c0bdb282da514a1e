"""A case file written with numpy, run, and its outputs read: python case_file.py path/to/fam"""
import subprocess, sys, tempfile
import numpy as np
from safetensors.numpy import load_file, save_file

q, k, v = (np.random.standard_normal((1, 100, heads, 64)).astype(np.float32) for heads in (8, 2, 2))
metadata = {"format": "1", "op": "attend", "block_len": "32", "window_blocks": "1", "source": "random numbers"}
with tempfile.TemporaryDirectory() as folder:
    case, output = f"{folder}/case.safetensors", f"{folder}/output.safetensors"
    save_file({"q": q, "k": k, "v": v}, case, metadata)
    subprocess.run([sys.argv[1], "run", case, "--output", output], check=True)
    print({name: tensor.shape for name, tensor in load_file(output).items()})
