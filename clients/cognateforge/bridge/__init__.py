"""Ways out of the exchange for those who want its events elsewhere."""
