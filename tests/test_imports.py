"""What is imported when: counted, because seconds differ between machines."""

import json
import subprocess
import sys

CODE = """if True:
    import json, sys
    seen = set(sys.modules)

    def new():
        global seen
        before, seen = seen, set(sys.modules)
        return sorted(seen - before)

    import softkv
    steps = {"import softkv": new()}
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes))
    steps["a model"] = new()
    soft = softkv.attach(base, softkv.PTuningV2(length=2))
    steps["attach"] = new()
    soft.eval()(torch.tensor([[1, 2, 3]]))
    steps["forward"] = new()
    print(json.dumps(steps))"""


def packages(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_attach_imports_nothing_that_a_model_did_not() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    steps = json.loads(done.stdout)
    assert packages(steps["import softkv"]) == {"softkv"}
    assert "softkv.hf.model" in steps["attach"]
    ours = [name for name in steps["attach"] if name.startswith("softkv")]
    others = [name for name in steps["attach"] + steps["forward"] if not name.startswith("softkv")]
    assert len(ours) < 100
    assert len(others) < 10, others
    heavy = {"accelerate", "datasets", "matplotlib", "numba", "pandas", "peft", "scipy", "sklearn", "triton"}
    assert not packages(others) & heavy
    assert not any(name.startswith(("transformers.trainer", "softkv.train")) for name in steps["attach"])
