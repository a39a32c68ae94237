"""LoRA adapters in PEFT's format, read and written as arrays and names: nothing here knows our parameter trees."""
