"""Places that a run writes to: a local folder, or a prefix of an object store."""

from runtime.corpus.stores.base import Store, Written
from runtime.corpus.stores.opening import store_from_location

__all__ = ["Store", "Written", "store_from_location"]
