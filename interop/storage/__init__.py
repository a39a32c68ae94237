"""Files of tensors: the safetensors format, read and written in parts."""
