"""Everything that all nodes must compute with the same bits: layout, codecs, aggregation, outer step, digests."""
