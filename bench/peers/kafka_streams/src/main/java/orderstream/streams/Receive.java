package orderstream.streams;

import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;

/** Reads deliveries; adds their units to the product's stock. */
final class Receive extends Stage<Delivery> {
    private KeyValueStore<String, Stock> stock;

    @Override
    public void init(ProcessorContext<Object, Object> given) {
        super.init(given);
        stock = stock();
    }

    @Override
    public void process(Record<String, Delivery> record) {
        Stock known = stock.get(record.key());
        Stock before = known == null ? new Stock(0, 0, 0, 0) : known;
        stock.put(record.key(), before.receive(record.value().units(), record.value().priceCents()));
    }
}
