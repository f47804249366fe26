"""A base sharded with FSDP2: attached to on the meta device, sharded, loaded, trained and saved.

torchrun --nproc_per_node 2 examples/fsdp2.py MODEL_FOLDER OUTPUT_FOLDER [STEPS]
"""

import sys

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import softkv
from softkv.train.processes import leave_together


def main(folder: str, output: str, steps: int) -> None:
    dist.init_process_group()
    rank, device = dist.get_rank(), "cuda" if torch.cuda.is_available() else "cpu"

    with init_empty_weights():
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    torch.manual_seed(0)  # every process starts with the same prompt
    model = softkv.attach(base, softkv.PTuningV2(length=8, init_std=0.1))
    for module in (*base.model.layers, model):
        fully_shard(module)
    model.to_empty(device=device)  # a place for the base's weights; what is learned keeps its values
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(base, load_file(f"{folder}/model.safetensors") if rank == 0 else {}, options=whole)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [model.method.encode(tokenizer, X=f"{at} plus {at} is", answer=str(2 * at)) for at in range(8)]
    batch = {name: x.to(device) for name, x in softkv.PaddingCollator()(rows[rank :: dist.get_world_size()]).items()}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for number in range(steps):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {number}: {loss.item():.4f}", flush=True)
    model.save_pretrained(output, is_main_process=rank == 0)  # gathers: every process calls it
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int([*sys.argv, "10"][3]))
