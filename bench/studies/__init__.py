"""Studies: each measures one thing once, for one page of docs/; nothing in `bench` itself imports them."""
