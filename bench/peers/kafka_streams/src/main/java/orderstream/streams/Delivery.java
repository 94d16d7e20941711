package orderstream.streams;

/** Units of a product that came in, as they stand on the topic of stock. */
record Delivery(long units, long priceCents) {}
