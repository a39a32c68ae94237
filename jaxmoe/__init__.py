"""Fine-tuning mixture-of-experts language models in JAX: Hugging Face in, Hugging Face out."""

from typing import TYPE_CHECKING, Any

from jaxmoe.errors import UserError

if TYPE_CHECKING:
    from jaxmoe.interop.pretrained import from_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = ["UserError", "from_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    # The interop layer stands above this package and pulls in transformers: loaded when it is first asked for.
    if name in ("from_pretrained", "save_pretrained"):
        from jaxmoe.interop import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
