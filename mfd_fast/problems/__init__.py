"""What a checked call is: the one description that ops, backends and the reference read. It reads none of them."""
