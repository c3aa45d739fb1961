"""Load on a server, and what its clients see of it: open-loop arrivals, streams, percentiles."""
