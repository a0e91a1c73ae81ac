"""Makes what the bundled demos show: boards, the small model that reads them, its training and its test."""
