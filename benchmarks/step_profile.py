"""`python -m benchmarks.step_profile`: where the time of a training step goes. P-tuning v2, P=64, like the case v2-64
of `softkv bench train`: 16 movie snippets per step, packed, SmolLM2-135M-Instruct, fp32."""

from __future__ import annotations

from . import movie_snippets, smollm2
from .machine import machine
from .results import FOLDER, write_json
from .train import TEMPLATE

BATCH, STEPS = 16, 4
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def main() -> None:
    import softkv
    from softkv.profiling import trace

    model, tokenizer = smollm2.load()
    soft_model = softkv.attach(model, softkv.PTuningV2(length=64, template=TEMPLATE), tokenizer=tokenizer)
    rows = movie_snippets.read("train")[: BATCH * (STEPS + 1)]
    encode = soft_model.method.encode
    data = [encode(tokenizer, text=row["text"], answer=f" {row['label']}") for row in rows]
    ranges, operations = trace.lines(trace.train(soft_model, data, BATCH, STEPS))

    def in_ranges(name: str) -> float:
        return sum(line.host for line in ranges if line.name.startswith(name))

    def in_operations(*names: str) -> float:
        return sum(line.own_host for line in operations if line.name in names)

    shares = {
        "products with the frozen weights": in_operations(*PRODUCTS),
        "attention, forward": in_ranges("attention, layer"),
        "attention, backward": in_ranges("backward of attention, layer"),
    }
    total = sum(line.own_host for line in operations)
    shares["all else: norms, rotations, activations, residuals, loss, optimizer"] = total - sum(shares.values())
    milliseconds = {name: value / STEPS for name, value in shares.items()}
    content = {"machine": machine(), "command": "python -m benchmarks.step_profile", "steps": STEPS}
    write_json(FOLDER / "step_profile.json", content | {"milliseconds_a_step": milliseconds})
    for name, value in milliseconds.items():
        print(f"{value:8.1f} ms  {value / sum(milliseconds.values()):5.1%}  {name}")


if __name__ == "__main__":
    main()
