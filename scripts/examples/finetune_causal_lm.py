"""Fine-tunes a causal language model of Hugging Face with DoPr, beside the same without it.

    pip install -e ".[language]"
    python scripts/examples/finetune_causal_lm.py --model FOLDER_OR_NAME --text FILE [--lora 8]

Prints the loss of held-out text, the time of a step and the peak memory of both, and their ratios.
`--out` gets the weights that DoPr trained, in Hugging Face's format; with `--lora`, the adapters.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowdopr.optim import build_optimizer
from flowdopr.processes import peak_memory_mib


def run(options: argparse.Namespace, dopr: dict | None) -> dict[str, float]:
    """One training: held-out loss in nats per token, seconds a step (median), and peak memory."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    if options.lora:
        model = get_peft_model(model, LoraConfig(r=options.lora, target_modules="all-linear"))
    model.to(options.device).train()
    tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // options.length * options.length])
    blocks = blocks.view(-1, options.length).to(options.device)
    held_out, data = blocks[: options.batch], blocks[options.batch :]
    if not len(data):
        raise SystemExit(f"{options.text}: too short: lower --length or --batch")
    optimizer = build_optimizer(model, options.gp, options.lr, dopr=dopr)
    seconds = []
    for _ in range(options.steps):
        batch = data[torch.randint(len(data), (options.batch,))]
        began = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if options.device != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    with torch.no_grad():
        loss = model.eval()(input_ids=held_out, labels=held_out).loss.item()
    if dopr is not None and options.out:
        model.save_pretrained(options.out)
    memory = peak_memory_mib(torch.device(options.device))
    return {"loss": loss, "seconds a step": sorted(seconds)[len(seconds) // 2], "MiB": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a name that transformers downloads")
    add("--text", type=Path, required=True, help="a file of text to learn")
    add("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    add("--gp", default="adamw", help="the optimizer: adamw, muon, soap, ...")
    add("--lr", type=float, default=1e-4, help="learning rate")
    add("--steps", type=int, default=100, help="of training")
    add("--batch", type=int, default=8, help="blocks of tokens in a batch, and held out")
    add("--length", type=int, default=256, help="tokens in a block")
    add("--dtype", default="float32", help="of the weights: float32 or bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--out", type=Path, help="folder for the weights")
    options, found = parser.parse_args(), []
    for dopr in (None, {}):  # each in a process of its own, so that its peak of memory is its own
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(run, (options, dopr)))
    for name, one in found[0].items():
        other = found[1][name]
        print(f"{name}: {one:.4g} alone, {other:.4g} with DoPr, {other / one:.3f} times")


if __name__ == "__main__":
    main()
