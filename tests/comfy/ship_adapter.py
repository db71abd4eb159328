"""Put the run of `make demo` into comfy_nodes/loras as ngrpo-demo.safetensors: python ship_adapter.py RUN

In bfloat16, half the size; the header stays, but for the run's folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ngrpo_lora.adapters.finding import FILE_NAME
from ngrpo_lora.adapters.reading import read_metadata

TARGET = Path(__file__).resolve().parents[2] / "comfy_nodes" / "loras" / "ngrpo-demo.safetensors"

if __name__ == "__main__":
    source = Path(sys.argv[1]) / "adapter" / FILE_NAME
    header = read_metadata(source)
    own = json.loads(header["ngrpo"])
    own["config"]["output_dir"] = "runs/demo"
    header |= {"ngrpo": json.dumps(own, sort_keys=True), "ss_output_name": "demo"}
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(source).items()}, TARGET, header)
