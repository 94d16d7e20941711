package orderstream.streams;

import java.nio.ByteBuffer;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.serialization.Serializer;

/** What is left of a product, in units, and what one costs: a value of the state store. */
record Stock(long onHand, long reserved, long sold, long priceCents) {
    private static final int BYTES = 4 * Long.BYTES;

    static Serde<Stock> serde() {
        Serializer<Stock> write = (topic, stock) -> stock == null ? null : stock.bytes();
        Deserializer<Stock> read = (topic, bytes) -> bytes == null ? null : of(ByteBuffer.wrap(bytes));
        return Serdes.serdeFrom(write, read);
    }

    long available() {
        return onHand - reserved;
    }

    Stock receive(long units, long price) {
        return new Stock(onHand + units, reserved, sold, price);
    }

    Stock hold(long units) {
        return new Stock(onHand, reserved + units, sold, priceCents);
    }

    Stock sell(long units) {
        return new Stock(onHand - units, reserved - units, sold + units, priceCents);
    }

    private byte[] bytes() {
        return ByteBuffer.allocate(BYTES).putLong(onHand).putLong(reserved).putLong(sold).putLong(priceCents).array();
    }

    private static Stock of(ByteBuffer bytes) {
        return new Stock(bytes.getLong(), bytes.getLong(), bytes.getLong(), bytes.getLong());
    }
}
