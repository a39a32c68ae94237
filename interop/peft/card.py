"""The README.md of an adapter's folder, with the fields by which hubs find and show it."""

import yaml

_TEXT = """
# LoRA adapter{of_base}

Low-rank weights in PEFT's format, trained with jaxmoe.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```
"""


def model_card(base: str | None) -> str:
    """The card of an adapter for text generation.

    Args:
        base: hub id or path of the model that it was trained on.
    """
    tags = ["lora", "transformers", "jaxmoe"]
    fields: dict[str, object] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if base is not None:
        fields = {"base_model": base, **fields}
        tags.insert(0, f"base_model:adapter:{base}")
    header = yaml.safe_dump({**fields, "tags": tags}, sort_keys=False, allow_unicode=True)
    of_base = "" if base is None else f" of {base}"
    return f"---\n{header}---\n{_TEXT.format(of_base=of_base, base=base or 'path/to/the/base')}"
