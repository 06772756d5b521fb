"""What every node must compute to the same bits: layout, codecs, aggregation, outer step, digests."""
