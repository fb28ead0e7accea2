"""Prompt sets: the sentences that tell a vision-language model what normal and anomalous look like.

Templates make them offline (`ensembles`), a language model makes more (`generators`, `llm`), a person edits the
JSON file (`prompt_set`). Nothing of a language model is imported until one is asked.
"""

from edgead.server_side.prompts.ensembles import (
    alfa,
    april_gan,
    descriptors,
    normality,
    normality_phrases,
    winclip,
)
from edgead.server_side.prompts.prompt_set import (
    Exchange,
    Prompt,
    PromptSet,
    State,
    read_prompt_set,
    write_prompt_set,
)

__all__ = [
    "Exchange",
    "Prompt",
    "PromptSet",
    "State",
    "alfa",
    "april_gan",
    "descriptors",
    "normality",
    "normality_phrases",
    "read_prompt_set",
    "winclip",
    "write_prompt_set",
]
