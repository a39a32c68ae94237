"""From text files to batches: documents, tokenizers, training batches, held-out windows."""

from jaxmoe.data.batches import BatchSpec, check_proportion, training_batches
from jaxmoe.data.documents import Documents, open_documents, split_documents
from jaxmoe.data.encoder import DocumentEncoder, check_separable
from jaxmoe.data.evaluation import Evaluation, byte_baselines, evaluation_windows
from jaxmoe.data.tokenizer import (
    TOKENIZER_FILES,
    end_of_document,
    load_tokenizer,
    save_tokenizer,
    train_byte_bpe,
    vocabulary_size,
)

__all__ = [
    "TOKENIZER_FILES",
    "BatchSpec",
    "DocumentEncoder",
    "Documents",
    "Evaluation",
    "byte_baselines",
    "check_proportion",
    "check_separable",
    "end_of_document",
    "evaluation_windows",
    "load_tokenizer",
    "open_documents",
    "save_tokenizer",
    "split_documents",
    "train_byte_bpe",
    "training_batches",
    "vocabulary_size",
]
