"""The configuration that `edgead kka new` writes: every field with its default and what it means."""

from __future__ import annotations

import json

from edgead.server_side.kka.config import PROMPT

_TEMPLATE = """\
# A run of key knowledge augmentation. Every field is here with its default; only `normals` has none.
# Paths are relative to this file.

normals = {normals}            # folder of photographs of normal parts
product = "part"
class_name = "part"            # what the part is, in words: {class_name} in templates and prompts
mode = "add"                   # add: each round's anomalies join those before; rep: hard ones replace easy ones
rounds = 0                     # of preference training (2 or 3 in the paper); needs imagine.author = "local"
captions = 200                 # in each round
seed = 0                       # of every random choice
backbone = "embedded"          # in whose features clusters are found and the evaluator learns; or a model of timm

[describe]                     # captions of the normals: from a file, a captioner, or the template
captions = ""                  # file of lines FILE<TAB>CAPTION; FILE is a name, or a path below `normals`
captioner = ""                 # folder of an image-to-text model of transformers
template = "a photograph of a flawless {class_name}"

[representatives]              # the most typical normal of each cluster; captions are written after theirs
clusters = 8
shrinkage = 0.1                # 0 to 1: share of the common variance in each cluster's own

[imagine]                      # who writes captions of anomalies
author = "grammar"             # grammar: at random, no model; local: a causal model of transformers; endpoint
model = ""                     # folder of the local model, or the endpoint's name of one
url = ""                       # of an OpenAI-compatible endpoint
key_env = ""                   # environment variable with its key
prompt = {prompt}
temperature = 1.0
top_p = 1.0
max_tokens = 64                # longest answer
batch = 16                     # answers that a local model writes together
attempts = 3                   # until an answer can be used

[paint]                        # who paints them
painter = "procedural"         # or text-to-image, inpainting: pipelines of diffusers
model = ""                     # folder of the pipeline
prompt = "{caption}"           # what the pipeline is told
negative_prompt = ""
steps = 30                     # of the pipeline
guidance = 7.5                 # of the pipeline
strength = 1.0                 # 0 to 1: how much of the photograph inpainting may change
size = 512                     # side of what a pipeline paints, in pixels
images = 1                     # of each caption
within = "part"                # part: on the part that is found on the photograph; frame: anywhere

[judge]                        # the confusion evaluator
hard_quantile = 1.0            # hard: nearer to the centre than this quantile of held-out normals; 1: than some normal
visible_floor = 4.0            # mean change of colour, 0 to 255, below which a defect is too faint to count
eta = 1.0                      # weight of anomalies in its loss
evaluator = "each"             # each: trained anew in each round; first: that of round 0 judges all
folds = 2                      # photographs are judged by an evaluator that never saw them; 1: by one that did
steps = 600                    # of its training, at most
batch = 32
learning_rate = 1e-4
held_out = 0.2                 # with one fold: share of the normals that it does not train on; else a fold is held out
size = 128                     # side of what it sees, in pixels, a multiple of 32

[prefer]                       # direct preference optimisation with LoRA
beta = 0.1
rank = 8
alpha = 8.0
dropout = 0.1
learning_rate = 5e-5
pairs = 256                    # of a hard and an easy caption, at most
steps = 150
batch = 4
accumulate = 4                 # batches that are summed before a step
likelihood = 0.0               # weight of the chosen captions' likelihood; 0.1 to 1 if the author forgets its language
reject_faint = true            # captions of too faint anomalies are rejected like easy ones
target_modules = []            # layers with adapters; [] for those that peft knows of the model

[evaluate]                     # labelled pictures on which the sets of rounds are compared; nothing rests on them
data = ""                      # folder in the MVTec layout; empty for no comparison
steps = 1500                   # of the detector that is trained with each set
size = 256                     # side of what it sees, in pixels, a multiple of 32
"""


def template(normals: str) -> str:
    """The TOML.

    Args:
        normals: folder of photographs, absolute or relative to the file's own folder.
    """
    # A basic string of TOML takes what JSON writes, but for DEL.
    words = {"{normals}": json.dumps(normals).replace("\x7f", "\\u007f"), "{prompt}": json.dumps(PROMPT)}
    text = _TEMPLATE
    for place, value in words.items():
        text = text.replace(f" = {place}", f" = {value}", 1)
    return text


__all__ = ["template"]
