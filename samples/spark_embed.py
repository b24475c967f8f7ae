"""Recipe: embed a corpus with Spark, whose executors read, compute and write.

    spark-submit samples/spark_embed.py MODEL SOURCE.parquet OUT TEXT_COLUMN LANGUAGE

Every Python worker opens the model once and keeps it for all of its tasks. The bookkeeping is Spark's: a
failed task is computed again, and the output is a folder of Parquet as Spark writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from runtime.corpus import BatchEmbedder

__all__ = ["embedded"]


def embedded(frame: Any, model: str, *, text: str, language: str | None = None) -> Any:
    """Return a Spark data frame with two more columns: ``vector`` and ``problem``, null for good rows.

    Args:
        frame: Spark data frame with a column of texts.
        model: ``REPOSITORY/NAME``, at the same path on every executor.
    """
    import pyarrow
    from pyspark.sql.types import ArrayType, FloatType, StringType, StructField, StructType

    schema = StructType(
        [
            *frame.schema.fields,
            StructField("vector", ArrayType(FloatType())),
            StructField("problem", StringType()),
        ]
    )

    embed = BatchEmbedder(model, text=text, language=language, threads=1)

    def run(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            found = embed(batch)
            place = found.schema.get_field_index("vector")
            lists = found.column("vector").cast(pyarrow.list_(pyarrow.float32()))  # Spark has no fixed sizes
            yield found.set_column(place, "vector", lists)

    return frame.mapInArrow(run, schema)


def main() -> None:
    """Embed a Parquet file or folder into a folder."""
    from pyspark.sql import SparkSession

    model, source, out, text, language = sys.argv[1:]
    spark = SparkSession.builder.appName("babeltower").getOrCreate()
    embedded(spark.read.parquet(source), model, text=text, language=language).write.parquet(out)


if __name__ == "__main__":
    main()
