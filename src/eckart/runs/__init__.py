"""Training runs: a decoder, any optimiser, any structure of weights, from a file of settings to a model folder.

    output: out/sltrain-galore
    seed: 0
    model: {type: llama, hidden_size: 256, num_hidden_layers: 6}     # or {folder: MODEL}, to go on from one
    data: {texts: [builtin, more.txt], length: 256, held_out: 0.05}
    training: {steps: 1000, batch: 32, warmup: 0.1, precision: bfloat16, save_every: 100}
    optimizer: {name: galore, lr: 1e-2, rank: 64, include: "(q|k|v|o)_proj"}
    structure: {method: sltrain, rank: 64, layers: ".*mlp.*"}

is trained by `eckart train run.yaml`, or `train("run.yaml")`; every key but `output` may be left out. The loop alone:

    loop = Loop(model, optimizer, windows, Training(steps=100), schedule=schedule)
    while loop.steps < 100:
        print(loop.step().loss)

An adapter on a frozen model, from a file of examples to a PEFT folder:

    finetune("MODEL", "svfit", data="examples.jsonl", output="out/adapter", steps=200, settings={"rank": 16})

is `eckart finetune MODEL --adapter svfit --data examples.jsonl --output out/adapter --steps 200 --set rank=16`.
"""

from eckart.runs.build import train_tokenizer
from eckart.runs.config import Config, Data, Model, Optimizer, Structure, Training
from eckart.runs.finetune import Finetuned, finetune
from eckart.runs.finetuning import Finetuning
from eckart.runs.loop import Loop, Measured
from eckart.runs.read import read_yaml
from eckart.runs.train import Trained, finish, train

__all__ = [
    "Config",
    "Data",
    "Finetuned",
    "Finetuning",
    "Loop",
    "Measured",
    "Model",
    "Optimizer",
    "Structure",
    "Trained",
    "Training",
    "finetune",
    "finish",
    "read_yaml",
    "train",
    "train_tokenizer",
]
