"""orderstream: an order pipeline on Kafka that sells no unit twice.

Orders are records on a topic.  Faust agents hold stock for them, charge, and commit the sale or release the stock; Redis
refuses what can't be had, Postgres has the last word on every count.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("orderstream")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
