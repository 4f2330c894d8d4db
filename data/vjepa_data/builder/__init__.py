"""Raw videos to shards, in stages with a file each.

    ingest    what there is: folders, files, tables -> a list of sources
    select    what is worth keeping: probe, filter, duplicates, cut, splits -> a list of clips
    pack      which clip goes to which shard, frozen as a file
    write     encode, check, store; any number of times, on any number of machines
    report    a page about the result

`shard` runs them all. Its result is a function of the sources and the spec alone. `survey` says beforehand what it will
cost, `admit` makes a corpus of shards that others wrote, and `verify` asks whether a corpus is what it says.
"""

from vjepa_data.builder.shard import shard

__all__ = ["shard"]
