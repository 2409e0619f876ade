"""From text to token stores on disk, and from stores to rows of a batch."""

from llm_training.data.all_sources import prepare_data
from llm_training.data.errors import DataError
from llm_training.data.prepared import PreparedData
from llm_training.data.tokens.token_store import TokenStore

__all__ = ["DataError", "PreparedData", "TokenStore", "prepare_data"]
