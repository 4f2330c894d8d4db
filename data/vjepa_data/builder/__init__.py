"""Turn raw videos into shards, in stages with a file each.

    ingest    folders, files and tables -> a list of sources
    select    analyze, filter, deduplicate, cut and split the sources -> a list of clips
    pack      assign clips to shards and save the plan
    write     encode, check and store the clips, on any number of machines
    report    render a page about the result

`shard` runs all stages. Its result depends only on the sources and the spec. `survey` estimates the cost beforehand,
`index_foreign` makes a corpus of shards that another tool wrote, and `verify` checks a corpus against its manifest.
"""

from vjepa_data.builder.shard import shard

__all__ = ["shard"]
